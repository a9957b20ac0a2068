"""docs/monitoring: every metric that it names is told by a real daemon, and every one that is told is named."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd
from tests.metrics.test_endpoint import Scraped
from tests.ports import free_port

DOCS = Path(__file__).parents[2] / "docs" / "monitoring"
NAME = re.compile(r"\b(?:hvsnap|process)_[a-z_]+")
LABEL = re.compile(r"([a-z]+)(?:=~?|!=)\"")
AHEAD = {"hvsnap_store_verified_since_timestamp_seconds"}
"""Told only once a pack was verified."""

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian's prometheus) is not installed"
)


def rules() -> str:
    return (DOCS / "alerts.yml").read_text()


def expressions() -> list[str]:
    """Return all expressions of the rules and of the dashboard."""
    found = re.findall(r"^ +expr: (.*)$", rules(), re.M)
    return found + [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def dashboard() -> dict[str, Any]:
    return dict(json.loads((DOCS / "dashboard.json").read_text()))


@pytest.fixture
def told(workdir: Path, libvirtd: Libvirtd, make_guest: Callable[..., Guest]) -> Iterator[dict[str, set[str]]]:
    """The names of all samples that a daemon tells, with their labels: one that has a disk, and a broker."""
    guest = make_guest([DiskSpec(make_image(workdir / "a.qcow2", "16M"))])
    guest.start()
    daemon = Scraped(workdir, libvirtd.uri, mqtt=f'url = "mqtt://127.0.0.1:{free_port()}"')
    try:
        daemon.start()
        daemon.snapshot(guest.name)
        families = parse(httpx.get(daemon.url).text)
        yield {sample.name: set(sample.labels) for family in families for sample in family.samples}
    finally:
        daemon.stop()


def test_rules_dashboard_and_page_name_what_a_daemon_tells(told: dict[str, set[str]]) -> None:
    used = {name for expression in expressions() for name in NAME.findall(expression)}
    assert used - set(told) - AHEAD == set()
    assert len(used) > 20
    page = set(NAME.findall((DOCS / "README.md").read_text()))
    own = {re.sub(r"_(bucket|sum|count)$", "", name) for name in told if name.startswith("hvsnap_")}
    assert {name for name in page if name.startswith("hvsnap_")} == own | AHEAD


def test_expressions_use_labels_that_there_are(told: dict[str, set[str]]) -> None:
    of_the_scrape = {"instance", "job"}
    for expression in expressions():
        for name, selector in re.findall(r"\b(hvsnap_[a-z_]+)\{([^}]*)\}", expression):
            assert set(LABEL.findall(selector)) <= told.get(name, set()) | of_the_scrape, expression
    for rule in re.split(r"^ +- alert: ", rules(), flags=re.M)[1:]:
        (first, *_) = NAME.findall(rule) or ["up"]
        for label in re.findall(r"\$labels\.([a-z]+)", rule):
            assert label in told.get(first, set()) | of_the_scrape, rule


def test_every_rule_has_a_severity_a_summary_and_a_remedy_and_a_case() -> None:
    cases = (DOCS / "alerts_test.yml").read_text()
    found = re.split(r"^ +- alert: ", rules(), flags=re.M)[1:]
    assert len(found) >= 12
    for rule in found:
        name = rule.split("\n", 1)[0]
        assert re.search(r"severity: (info|warning|critical)", rule), name
        assert "summary: " in rule, name
        assert "remedy: " in rule, name
        assert re.search(rf"alertname: {name}\n(?:.*\n){{1,3}}.*exp_labels", cases), f"no case in which {name} fires"


@promtool
def test_prometheus_takes_configuration_and_rules_and_the_cases_come_out(tmp_path: Path) -> None:
    for path in DOCS.glob("*.yml"):
        shutil.copy(path, tmp_path)
    for words in (
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ):
        done = subprocess.run(["promtool", *words], cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_the_dashboard_s_expressions_are_prometheus_s(tmp_path: Path) -> None:
    filled = [one.replace("$instance", ".*") for one in expressions()]
    lines = [f"      - {{record: 'a:b:c{number}', expr: {json.dumps(one)}}}" for number, one in enumerate(filled)]
    path = tmp_path / "expressions.yml"
    path.write_text("groups:\n  - name: all\n    rules:\n" + "\n".join(lines) + "\n")
    done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_s_panels_do_not_overlap_and_have_one_source() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)
