"""Templates in commands and action arguments.

`{model_path}`, `{port}`, and results of earlier actions: `{ref}` (the output of a `run_command` without
its last line break, the file name of a `write_file` or `write_tempfile`, the path of a `mkdir`),
`{ref.out}`, `{ref.err}`. A brace that names nothing known stays as it is, so that JSON and awk survive,
and `${NAME}` is the shell's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAME = re.compile(r"(?<!\$)\{([A-Za-z_][A-Za-z0-9_-]*(?:\.(?:out|err))?)\}")


def fill(text: str, values: Mapping[str, str]) -> str:
    """Replaces what is known. A replacement is not looked at again."""
    return _NAME.sub(lambda match: values.get(match[1], match[0]), text)
