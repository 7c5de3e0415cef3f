"""The dashboard and the scrape configurations, as far as can be told without a cluster."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy import dashboards
from infinillm.telemetry import PREFIX, TABLE

PROMETHEUS = Path(__file__).parents[2] / "deploy" / "prometheus"
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
SERIES = {PREFIX + name + suffix for name, metric in TABLE.items() for suffix in SUFFIXES[metric.kind]}


def test_the_file_is_what_the_code_makes() -> None:
    assert dashboards.FILE.read_text(encoding="utf-8") == dashboards.text(), "run: python deploy/dashboards.py"


@pytest.mark.parametrize("panel", dashboards.panels(), ids=lambda panel: panel.title)
def test_panels_speak_of_metrics_that_exist(panel: dashboards.Panel) -> None:
    assert panel.about.endswith(".")
    assert panel.unit
    for expression, legend in panel.queries:
        assert legend
        used = set(re.findall(rf"{PREFIX}\w+", expression))
        assert used <= SERIES, used - SERIES
        assert used or "process_" in expression
        for name, labels in re.findall(rf"{PREFIX}(\w+?)(?:_bucket)?{{([^}}]*)}}", expression):
            for label, values in re.findall(r'(\w+)[=!]~?"([^"]*)"', labels):
                assert label in TABLE[name].labels
                known = TABLE[name].labels[label]
                assert set(values.split("|")) <= set(known), f"{label} of {name} is never {values}"
        if "rate(" in expression:
            assert "[$__rate_interval]" in expression
        by = set(re.findall(r"\{\{(\w+)\}\}", legend)) - {"instance"}
        labels_of = {label for name in used for label in _labels(name)}
        assert by <= labels_of, f"{legend}: {used} has no {by - labels_of}"


def _labels(series: str) -> tuple[str, ...]:
    name = re.sub(r"_(bucket|sum|count)$", "", series.removeprefix(PREFIX))
    return tuple(TABLE.get(name, TABLE.get(series.removeprefix(PREFIX))).labels)  # type: ignore[union-attr]


def test_every_metric_has_a_panel() -> None:
    text = " ".join(expression for panel in dashboards.panels() for expression, _ in panel.queries)
    assert [name for name in TABLE if PREFIX + name not in text] == []


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(dashboards.text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
    ids = [panel["id"] for panel in json.loads(dashboards.text())["panels"]]
    assert len(ids) == len(set(ids))


def test_alerts_speak_of_metrics_that_exist_and_each_is_shown_to_fire() -> None:
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        used = set(re.findall(rf"{PREFIX}\w+", rule["expr"]))
        assert used and used <= SERIES, used - SERIES
    (scenario,) = yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text())["tests"]
    shown = {each["alertname"] for each in scenario["alert_rule_test"] if each["exp_alerts"]}
    assert shown == {rule["alert"] for rule in group["rules"]}


def test_alerts_fire_where_they_should(promtool: str) -> None:
    made = subprocess.run(
        [promtool, "test", "rules", str(PROMETHEUS / "alerts.test.yml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.parametrize("name", ["local", "kubernetes"])
def test_prometheus_takes_the_scrape_configuration(promtool: str, name: str, tmp_path: Path) -> None:
    configuration = yaml.safe_load((PROMETHEUS / f"{name}.yml").read_text())
    for job in configuration["scrape_configs"]:
        job.pop("kubernetes_sd_configs", None)  # Debian's build cannot discover pods
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    command = [promtool, "check", "config", "--syntax-only", str(file)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
