"""A real Prometheus scrapes a real cluster under load: every panel shows data, alerts are provoked.

One cluster for all, in the order of this file: first a load that it carries, then one that it does not, then
replicas that die. Two alerts cannot be provoked without breaking the code (logits that are not finite, bytes
that change on the way): `metrics/test_alerts.py` has them, like all others, over made-up series.
"""

import json
import math
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
import yaml
from damaged import damaged_pages, damaged_weights
from observability.alerts import Tuning, alerts
from observability.capacity import CAPACITY
from observability.generate import rules_yaml
from observability.operators import OPERATORS
from observed import Prometheus, observed_app
from ray_cluster import Cluster
from served_app import Served

from quire.cluster import CallOptions, Client, SamplingParams, collect
from quire.cluster.cli.rollout import APP
from quire.cluster.metrics.catalogue import CATALOGUE
from quire.replicas.errors import QuireError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("promtool") is None,
        reason="needs Prometheus: apt-get install prometheus",
    ),
]

WINDOW = "10s"
TUNING = Tuning(
    window=WINDOW,
    hold="1s",
    hold_critical="1s",
    first_token_s=0.1,
    inter_token_s=0.001,
    bad_share=0.001,
    full_share=0.6,
    pool_share=0.6,
    preemptions_s=0.01,
    hit_history="20s",
    hit_gap="5s",
)
RULES = alerts(TUNING)
PATIENCE_S = 300
"""What is provoked takes seconds; a busy machine may take longer."""
SILENT = "127.0.0.1:1"
"""A metrics endpoint that does not answer."""

Ask = Callable[[Client, int], None]


class Stage:
    def __init__(self, cluster: Cluster, served: Served, prometheus: Prometheus) -> None:
        self.cluster, self.served, self.prometheus = cluster, served, prometheus
        self.fired: set[str] = set()
        self._numbers = count()

    @contextmanager
    def load(self, ask: Ask, clients: int) -> Iterator[None]:
        """Clients that ask again and again, each with a number that is never used twice."""
        over = threading.Event()

        def work() -> None:
            with Client(self.served.address) as client:
                while not over.is_set():
                    try:
                        ask(client, next(self._numbers))
                    except QuireError:
                        over.wait(0.1)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join(60)

    def ask_each(self, prompts: Sequence[str]) -> None:
        """All at once, whatever comes of it."""

        def ask(prompt: str) -> None:
            with Client(self.served.address) as client, suppress(QuireError):
                collect(client.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True)))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, prompts))

    def until_alive(self, replicas: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.prometheus.query(f"sum(ray_quire_replica_up == 1) == {replicas}"):
            self.look()
            assert time.monotonic() < deadline
            time.sleep(0.3)

    def look(self) -> None:
        """Notes what fires now."""
        self.fired |= {name for name, state in self.prometheus.alerts().items() if state == "firing"}

    def ask_until_firing(self, served: Served, alert: str, *, fails: bool) -> None:
        """Asks another application. Whether its answers must fail with INTERNAL, or must not."""
        sampling, deadline = SamplingParams(max_tokens=4, ignore_eos=True), time.monotonic() + PATIENCE_S
        for number in count():
            prompt = shared_prefix(number, sentences=40)
            assert (ask_at(served.address, prompt, sampling) == "INTERNAL") == fails
            self.look()
            if alert in self.fired:
                return
            assert time.monotonic() < deadline, f"{alert} did not fire"

    def until_firing(self, *names: str) -> None:
        """Not all at once: an alert that has fired has fired."""
        deadline, missing = time.monotonic() + PATIENCE_S, set(names)
        while missing := missing - self.fired:
            self.look()
            assert time.monotonic() < deadline, f"{sorted(missing)} did not fire, {sorted(self.fired)} did"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def stage(ray_cluster: Cluster, tmp_path_factory):
    rules = tmp_path_factory.mktemp("rules") / "rules.yml"
    rules.write_text(rules_yaml(RULES))
    changes = {
        "engine": {
            "tp": 1,
            "pool": {"bytes": 3 << 20, "host_bytes": 2 << 20},
            "scheduler": {"max_running": 4, "max_queued": 4},
            "store": {"lookup_timeout_s": 2.0, "fetch_timeout_s": 2.0},
        },
        "gateway": {"max_open_requests": 16},
        "replicas": {"count": 2},
    }
    with observed_app(ray_cluster, rules, [SILENT], **changes) as (served, prometheus):
        yield Stage(ray_cluster, served, prometheus)


def shared_prefixes(client: Client, number: int) -> None:
    """Eight in turn ask for the same prompt."""
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    collect(client.generate(shared_prefix(number // 8, sentences=40), sampling))


def shared_prefix(who: int, *, sentences: int) -> str:
    return " ".join(f"Long ago, the fox {who} met the hen {n}." for n in range(sentences))


def short_answers(client: Client, number: int) -> None:
    collect(client.generate(f"The hen {number}", SamplingParams(max_tokens=60, ignore_eos=True)))


def long_answers(client: Client, number: int) -> None:
    """No two prompts begin alike, and answers outgrow the pool; one in four is out of patience soon."""
    options = CallOptions(deadline_s=0.3) if number % 4 == 0 else CallOptions()
    collect(client.generate(unlike(number), SamplingParams(max_tokens=400, ignore_eos=True), options))


def unlike_prompts(client: Client, number: int) -> None:
    collect(client.generate(unlike(number), SamplingParams(max_tokens=8, ignore_eos=True)))


def unlike(number: int) -> str:
    return (
        f"{number} cats walked into the house and sat down beside the fire to tell a story about the sea. "
        * 3
    )


def panel_queries() -> dict[str, str]:
    """By dashboard, panel and legend, as Grafana would fill them in."""
    return {
        f"{dashboard.uid}: {row.title}: {panel.title}: {query.legend}": query.expression.replace(
            "$__rate_interval", WINDOW
        ).replace("$application", ".*")
        for dashboard in (OPERATORS, CAPACITY)
        for row in dashboard.rows
        for panel in row.panels
        for query in panel.queries
    }


def test_every_query_of_every_panel_returns_data(stage: Stage):
    missing = panel_queries()
    assert len(missing) > 70
    deadline = time.monotonic() + PATIENCE_S
    with stage.load(shared_prefixes, 6):
        while missing:
            missing = {
                name: query
                for name, query in missing.items()
                if not any(math.isfinite(float(s["value"][1])) for s in stage.prometheus.query(query))
            }
            assert time.monotonic() < deadline, f"no data: {missing}"
            time.sleep(1)


def test_every_metric_of_the_catalogue_is_exported_with_its_type_and_labels(stage: Stage):
    types = {name: entries[0]["type"] for name, entries in stage.prometheus.metadata().items()}
    for metric in CATALOGUE:
        assert types[metric.exported.removesuffix("_total")] == metric.kind, (
            metric.name
        )  # as OpenMetrics has it
        suffix = "_count" if metric.buckets else ""
        series = stage.prometheus.query(f'{metric.exported}{suffix}{{application="{APP}"}}')
        assert series, metric.name
        for one in series:
            assert one["metric"]["deployment"].lower() == metric.origin
            assert {"application", "replica", *metric.labels} <= set(one["metric"])


def test_ray_has_grafana_show_our_dashboards_beside_its_own(stage: Stage):
    """Grafana itself is not here: its configuration, as Ray writes it, and the files that it names."""
    (provider,) = stage.cluster.folder.glob(
        "ray/session_latest/metrics/grafana/provisioning/dashboards/*.yml"
    )
    shown = Path(yaml.safe_load(provider.read_text())["providers"][0]["options"]["path"])
    trees = [json.loads(path.read_text()) for path in shown.glob("*.json")]
    uids = [tree["uid"] for tree in trees]
    assert len(set(uids)) == len(uids) > 2
    assert {OPERATORS.uid, CAPACITY.uid} <= set(uids)
    linked = {link["url"] for tree in trees for link in tree.get("links", []) if link["type"] == "link"}
    assert linked
    assert linked <= {f"/d/{uid}" for uid in uids}


def test_promtool_finds_no_fault_in_our_metrics(stage: Stage):
    lines = []
    for target in stage.prometheus.query('up{job="ray"} == 1'):
        with urllib.request.urlopen(f"http://{target['metric']['instance']}/metrics") as page:
            lines += [line for line in page.read().decode().splitlines() if "ray_quire_" in line]
    assert lines
    text = "\n".join(lines) + "\n"
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    faults = (done.stdout + done.stderr).splitlines()
    assert all("camelCase" in fault for fault in faults), faults  # the labels that Ray adds


def test_every_alert_evaluates(stage: Stage):
    rules = stage.prometheus.rules()
    assert [rule["name"] for rule in rules] == [alert.name for alert in RULES]
    assert {rule["health"] for rule in rules} == {"ok"}
    for rule in rules:
        stage.prometheus.query(rule["query"])


def test_it_is_noticed_that_prompts_begin_alike_no_more(stage: Stage):
    """What they did before is looked up 20 s back: again where a busy machine took longer than that."""
    deadline = time.monotonic() + PATIENCE_S
    tokens = "ray_quire_prompt_tokens_total"
    hits = f'sum(rate({tokens}{{source!="computed"}}[{WINDOW}])) / sum(rate({tokens}[{WINDOW}]))'
    while "QuireHitRateCollapsed" not in stage.fired:
        assert time.monotonic() < deadline, f"it did not fire, {sorted(stage.fired)} did"
        with stage.load(shared_prefixes, 6):
            while not stage.prometheus.query(f"{hits} > 0.5"):
                assert time.monotonic() < deadline, stage.prometheus.query(hits)
                time.sleep(0.3)
        with stage.load(unlike_prompts, 6):
            until = time.monotonic() + 30  # nothing of what was before is remembered longer
            while "QuireHitRateCollapsed" not in stage.fired and time.monotonic() < until:
                stage.look()
                time.sleep(0.3)


def test_too_much_load_is_noticed(stage: Stage):
    with stage.load(long_answers, 24):
        stage.until_firing(
            "QuireNodeSilent",
            "QuireFirstTokenSlow",
            "QuireTokensSlow",
            "QuireGatewayFull",
            "QuireRequestsRefused",
            "QuireQueueFull",
            "QuirePoolFull",
            "QuirePreempting",
            "QuireRequestsFailing",
        )


def test_a_replica_that_dies_is_missed_and_so_are_its_blocks(stage: Stage):
    """Requests move to the other one; the directory names the dead one for a while yet, so fetches fail.

    Which replica has what is not ours to say: again until it has hit.
    """
    due, numbers = {"QuireTransfersFailing", "QuireReplicaMissing", "QuireRequestsRetried"}, count()
    deadline = time.monotonic() + PATIENCE_S
    with stage.load(short_answers, 4):
        while not stage.fired >= due:
            stage.until_alive(2)
            prompts = [shared_prefix(next(numbers), sentences=20) for _ in range(6)]
            stage.ask_each(prompts)
            stage.served.processes("Replica")[0].kill()
            stage.ask_each(prompts)
            for _ in range(10):
                stage.look()
                time.sleep(0.4)
            assert time.monotonic() < deadline, f"{sorted(due - stage.fired)} did not fire"


def test_it_is_noticed_that_none_lives(stage: Stage):
    deadline = time.monotonic() + PATIENCE_S
    while "QuireNoReplica" not in stage.fired:
        for process in stage.served.processes("Replica"):
            process.kill()
        stage.look()
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_damaged_blocks_are_noticed_and_answers_are_right_all_the_same(stage: Stage, joined: Cluster):
    with damaged_pages(joined) as served:
        stage.ask_until_firing(served, "QuireBlocksDamaged", fails=False)


def test_logits_that_are_not_finite_are_noticed(stage: Stage, joined: Cluster, tmp_path: Path):
    with damaged_weights(joined, tmp_path) as served:
        stage.ask_until_firing(served, "QuireNonFiniteLogits", fails=True)


def ask_at(address: str, prompt: str, sampling: SamplingParams) -> str | tuple[int, ...]:
    """The answer's tokens, or the status with which it failed."""
    with Client(address) as client:
        try:
            return tuple(collect(client.generate(prompt, sampling)).outputs[0].token_ids)
        except QuireError as error:
            return error.status.name


def test_nothing_was_left_out(stage: Stage):
    assert stage.fired == {alert.name for alert in RULES}
