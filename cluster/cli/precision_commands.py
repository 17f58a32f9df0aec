"""The commands that choose how KV is stored before anything is served: `quire calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from quire.cluster.cli.options import FILE, FOLDER, kv_option

POSITIVE = click.IntRange(min=1)


@click.command()
@click.argument("model")
@click.option("--text", "texts", type=FILE, multiple=True, required=True, help="UTF-8 text; may be repeated.")
@click.option("--out", type=FOLDER, required=True, help="The policy's folder.")
@kv_option
@click.option("--tokens", type=POSITIVE, default=8192, show_default=True, help="Tokens to measure.")
@click.option("--chunk-tokens", type=POSITIVE, default=1024, show_default=True, help="Tokens of a step.")
@click.option("--tp", type=POSITIVE, default=1, show_default=True, help="Tensor-parallel shards.")
def calibrate(
    model: str,
    texts: tuple[Path, ...],
    out: Path,
    kv: str | dict[str, object] | None,
    tokens: int,
    chunk_tokens: int,
    tp: int,
) -> None:
    """Find the shift and scale of MODEL's keys that lose the least, and write them as a policy for --kv.

    Texts should be like those to be served. Interrupted, it continues where it stopped.
    """
    from quire.replicas.config import EngineConfig
    from quire.replicas.precision.calibrate import calibrate as run
    from quire.replicas.precision.calibrate import read_texts

    config = EngineConfig(model=model, kv=kv or "int8", tp=tp)
    found = read_texts(model, texts, tokens=tokens, chunk_tokens=chunk_tokens)
    with click.progressbar(length=found.tokens, label="tokens", show_pos=True) as bar:
        run(config, found, out, lambda done, total: bar.update(done - bar.pos))
    click.echo(f"calibrated on {found.tokens} tokens: quire serve {model} --kv {out}")


COMMANDS = (calibrate,)
