"""What a configuration's model is, for processes elsewhere, and what is refused before any of them starts."""

import shutil
import socket
from pathlib import Path

import pytest
from served_app import free_port, quire
from tiny_models import make_model

from quire.cluster.cli.preflight import check, located
from quire.cluster.config import parse
from quire.replicas.errors import ConfigError, QuireError, UnknownModel
from quire.replicas.model.checkpoint import find_model


def config(model, **engine):
    return parse({"engine": {"model": str(model), **engine}, "gateway": {"port": free_port()}})


@pytest.fixture
def whole(tmp_path) -> Path:
    """A copy of the demo model."""
    return Path(shutil.copytree(find_model("demo"), tmp_path / "whole"))


@pytest.mark.parametrize("written", ["whole", "./whole", "../{}/whole"])
def test_a_relative_folder_becomes_absolute_and_keeps_its_name(whole, monkeypatch, written):
    monkeypatch.chdir(whole.parent)
    written = written.format(whole.parent.name)
    engine = located(config(written)).engine
    assert (engine.model, engine.name) == (str(whole), written)
    assert located(config(written, name="mine")).engine.name == "mine"


@pytest.mark.parametrize("model", ["demo", "/nowhere/at/all", "someone/something"])
def test_what_is_no_relative_folder_stays(model):
    given = config(model)
    assert located(given) == given


@pytest.mark.parametrize("model", ["./nowhere", "../nowhere", "~/nowhere at all"])
def test_a_path_that_leads_nowhere_is_refused_with_where_it_leads(model):
    with pytest.raises(UnknownModel, match=r"no such folder: /.*nowhere"):
        located(config(model))


def test_a_folder_that_only_other_machines_have_is_not_doubted():
    check(config("/nowhere/at/all"), here=False)
    with pytest.raises(UnknownModel):
        check(config("/nowhere/at/all"), here=True)


@pytest.mark.parametrize("here", [True, False])
def test_a_whole_model_passes(whole, here):
    check(config(whole), here=here)


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def broken(name: str):
    return lambda folder: (folder / name).write_text("{")


@pytest.mark.parametrize(
    ("damage", "engine", "says"),
    [
        (without_tokenizer, {}, "holds no tokenizer"),
        (broken("config.json"), {}, "config.json"),
        (broken("tokenizer.json"), {}, "tokenizer.json"),
        (broken("generation_config.json"), {}, "generation_config.json"),
        (lambda folder: None, {"max_model_tokens": 10**6}, "max_model_tokens is 1000000"),
        (lambda folder: None, {"tp": 3}, "3"),
    ],
)
@pytest.mark.parametrize("here", [True, False])
def test_what_no_replica_could_serve_is_refused_at_once(whole, damage, engine, says, here):
    damage(whole)
    with pytest.raises(QuireError, match=says):
        check(config(whole, **engine), here=here)


def test_a_port_is_this_machines_to_refuse(whole):
    taken = config(whole)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", taken.gateway.port))
        listener.listen()
        check(taken, here=False)
        with pytest.raises(ConfigError, match="cannot listen"):
            check(taken, here=True)


@pytest.mark.parametrize("command", ["serve", "deploy"])
def test_the_commands_refuse_a_damaged_folder_before_ray(tmp_path, command):
    folder = make_model("llama", tmp_path / "model")  # no tokenizer beside it
    file = tmp_path / "serve.yaml"
    file.write_text(f"engine: {{model: {folder}}}")
    done = quire("serve", "--config", str(file)) if command == "serve" else quire("deploy", str(file))
    assert done.returncode == 1
    *phases, said = done.stderr.splitlines()
    assert said.startswith(f"quire: {folder} holds no tokenizer")
    assert not any("Ray" in phase for phase in phases)
