"""Ends by nodes, and the last error of an endpoint"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("endpoints", schema=None) as batch_op:
        batch_op.add_column(sa.Column("evictions", sa.BigInteger(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("evicted_ms", sa.BigInteger(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("last_error", sa.Text(), server_default="", nullable=False))
