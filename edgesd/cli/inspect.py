"""edgesd inspect"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesd.cli.common import Reporter, print_json, say
from edgesd.cli.options import json_option
from edgesd.progress import count_bytes

if TYPE_CHECKING:
    from edgesd.runtime.bundle import Bundle
    from edgesd.spec.bundle import Engine


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def inspect_command(bundle: Path, as_json: bool) -> None:
    """Describe BUNDLE, and verify every byte of it."""
    from edgesd.runtime.bundle import open_bundle

    opened = open_bundle(bundle)
    manifest = opened.manifest
    reporter = Reporter(quiet=as_json)
    total = opened.total_bytes()
    with reporter.bar():
        opened.verify(on_bytes=count_bytes(reporter, "verify", total))
    if as_json:
        print_json({"verified": True, "bytes": total, "manifest": manifest})
        return
    for name, text in _facts(opened).items():
        say(f"{name:10} {text}")
    for name, engine in manifest.engines.items():
        say(f"{name:13} {opened.weight_bytes(name) / 1e6:9.1f} MB  {_engine(engine)}")
    say(f"verified: {len(manifest.files)} files, {total / 1e6:.1f} MB, every byte")


def _facts(bundle: Bundle) -> dict[str, str]:
    """Facts about a bundle to print, by name."""
    manifest = bundle.manifest
    pipeline, shape = manifest.pipeline, manifest.pipeline.shape
    size = f"{shape.width}x{shape.height}"
    facts = {
        "model": f"{manifest.name} (family {pipeline.family}, source sha256 "
        f"{pipeline.source_sha256[:16]})",
        "target": f"{manifest.target} ({manifest.arch}), {manifest.backend}, {manifest.precision}",
        "size": f"{size}, any multiple of {shape.multiple_of}" if shape.dynamic else f"{size} only",
        "defaults": f"{pipeline.num_inference_steps} steps of {pipeline.scheduler.name}, "
        f"guidance {pipeline.guidance_scale:g}",
        "licence": f"{manifest.licence.name} ({', '.join(manifest.licence.files) or 'no file'})",
        "tools": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
    }
    slots = [engine.slots for engine in manifest.engines.values() if engine.slots]
    if slots:
        layers, rank = sum(len(each.layers) for each in slots), max(each.rank for each in slots)
        facts["lora slots"] = f"{layers} layers, rank {rank} together at most"
    if bundle.signed:
        from edgesd.runtime.signature import signer

        facts["signed by"] = str(signer(bundle))
    if manifest.recipe and manifest.recipe.pooled_attention:
        facts["attention"] = "the largest has a quarter of its keys and values (pooled)"
    if manifest.build and manifest.build.embeddings:
        facts["tokens"] = ", ".join(one.token for one in manifest.build.embeddings)
    if manifest.build and manifest.build.loras:
        facts["LoRAs"] = ", ".join(f"{one.name}:{one.scale:g}" for one in manifest.build.loras)
    if manifest.prompter:
        tuned = manifest.prompter
        facts["prompter"] = f"for {tuned.domain}, {tuned.licence}"
    return facts


def _engine(engine: Engine) -> str:
    """One component's engine, for people."""
    return (
        f"{engine.precision}  "
        f"parity {engine.parity.rel_rms:.1e} RMS, {engine.parity.max_abs:.1e} max"
        + (f"; {engine.checked}" if engine.checked else "")
        + (f"; its plan is for {engine.built_for}" if engine.plan else "")
        + (f"; for edgesd's own kernels: {engine.kernels}" if engine.kernels else "")
    )
