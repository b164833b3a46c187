"""The dashboard and the alerts are whole: every expression parses, nothing overlaps, texts say what to do."""

from __future__ import annotations

import re

import monitoring


def test_every_expression_parses_and_names_metrics_of_ours() -> None:
    found = monitoring.wanted()
    assert len(found) > 60
    for one in found:
        assert one.metric.startswith(("dure_manager_", "dure_agent_", "dure_proxy_")), one
        # Counters and buckets mean something only as rates, gauges never as such.
        counted = one.metric.endswith(("_total", "_bucket", "_sum", "_count"))
        assert one.rated == counted, one


def test_panels_have_room_and_a_source() -> None:
    board = monitoring.dashboard()
    panels = board["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"] and panel["datasource"]["uid"] == "${datasource}"
            assert panel["fieldConfig"]["defaults"]["unit"]
    names = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)", str(panels)))
    assert used == names


def test_alerts_say_what_happened_and_what_to_do() -> None:
    rules = monitoring.alerts()
    names = [rule["alert"] for rule in rules]
    assert len(set(names)) == len(names) > 10
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule
        texts = rule["annotations"]
        assert set(texts) == {"summary", "action"}, rule["alert"]
        by = re.findall(r"by \(([^)]*)\)", rule["expr"])
        for label in re.findall(r"\$labels\.(\w+)", texts["summary"] + texts["action"]):
            # What is summed away cannot be shown.
            assert not by or any(label in names for names in by), (rule["alert"], label)
            assert "sum(" not in rule["expr"], (rule["alert"], label)
