"""Builds a bundle as another one says that it was built: `edgesd build --like`.

The other bundle may be anybody's: no path in it is opened, and a model is only looked up where it
is the embedded one or a hub id.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgesd.errors import UsageError
from edgesd.evaluate.perceptual import STAND_IN
from edgesd.evaluate.quality import METRIC_NAMES
from edgesd.runtime.bundle import open_bundle
from edgesd.spec.build import DEMO, HUB, BuildRecord, ModelReference, SideKind
from edgesd.spec.bundle import BundleManifest
from edgesd.spec.quality import Metric, Quality


@dataclass(frozen=True)
class Like:
    """A bundle that another one should equal, and how it was built."""

    path: Path
    manifest: BundleManifest
    record: BuildRecord

    @classmethod
    def of(cls, path: Path) -> Like:
        """The bundle at `path`. Raises BundleError, and UsageError where it doesn't say how it was
        built."""
        manifest = open_bundle(path).manifest
        if manifest.build is None:
            raise UsageError(
                f"{path} doesn't say how it was built, as bundles of older releases don't: give "
                "the options instead of --like"
            )
        return cls(path, manifest, manifest.build)

    def model(self) -> str:
        """The model to build from where the user names none. Raises UsageError for one that lay in
        a folder: where it is now, the user must say."""
        reference = self.record.model
        if reference.kind == DEMO:
            return DEMO
        return self._on_hub(
            reference, "from a model", f"say where it is: edgesd build MODEL --like {self.path}"
        )

    def vae(self) -> str | None:
        """The model of its autoencoder where that isn't the model's own. Raises UsageError for one
        that lay in a folder."""
        reference = self.record.vae
        if reference is None:
            return None
        return self._on_hub(reference, "with an autoencoder", "say where it is: --vae MODEL")

    def sides(self, kind: SideKind, given: tuple[str, ...]) -> tuple[str, ...]:
        """The ControlNets or adapters to build with: those that are `given`, or those of the hub
        that it was built with. Raises UsageError for others."""
        if given:
            return given
        found = []
        for side in self.record.sides:
            if side.kind == kind:
                advice = f"say where all of them are: --{kind} FOLDER:NAME for each"
                where = self._on_hub(side.model, f"with the {kind} {side.name!r}", advice)
                found.append(f"{where}:{side.name}" if side.name else where)
        return tuple(found)

    def _on_hub(self, reference: ModelReference, what: str, advice: str) -> str:
        """The hub id that was built from. Raises UsageError where it was none."""
        from edgesd.export.source import is_hub_id

        if reference.kind == HUB and is_hub_id(reference.name):
            return reference.name
        raise UsageError(
            f"{self.path} was built {what} called {reference.name!r} (sha256 "
            f"{reference.sha256[:16]}...): {advice}"
        )

    def check_embeddings(self, given: Collection[str]) -> None:
        """Raise UsageError where it was built with textual inversions and none are `given`: their
        files are the user's."""
        if self.record.embeddings and not given:
            tokens = ", ".join(one.token for one in self.record.embeddings)
            raise UsageError(
                f"{self.path} was built with the textual inversions {tokens[:200]}: say where they "
                "are: --embedding FILE:TOKEN for each"
            )

    def check_loras(self, given: Collection[str]) -> None:
        """The same for LoRAs."""
        if self.record.loras and not given:
            merged = ", ".join(
                f"{one.name}:{one.scale:g} (sha256 {one.sha256[:16]}...)"
                for one in self.record.loras
            )
            raise UsageError(
                f"{self.path} was built with the LoRAs {merged[:300]}: say where they are: "
                "--lora FILE:SCALE for each, in this order"
            )

    def expected_differences(
        self, sha256: str, tools: Mapping[str, str], prompter: bool
    ) -> list[str]:
        """What keeps another build from making the same bundle, a line for each.

        sha256: of the model that is built; tools: name -> version of what makes the graphs;
        prompter: whether one is included.
        """
        lines = []
        if sha256 != self.record.model.sha256:
            lines.append(
                f"the model isn't the one that {self.path} was built from (sha256 {sha256[:16]}... "
                f"here, {self.record.model.sha256[:16]}... there): graphs and weights will differ"
            )
        others = [name for name in tools if self.manifest.tools.get(name) != tools[name]]
        if others:
            lines.append(
                f"{self.path} was built with other releases of {', '.join(others)}: graphs and "
                "weights may differ"
            )
        if self.manifest.prompter and not prompter:
            lines.append(
                f"{self.path} includes a prompter, and this bundle won't: give --prompter FOLDER"
            )
        return lines

    def judged_otherwise(self, ours: BundleManifest) -> str | None:
        """A line where images were judged by other metrics than those of our bundle, so that
        other graphs may have been accepted; None where they weren't."""
        if ours.quality is None or self.manifest.quality is None:
            return None
        here, there = map(_judges, (ours.quality, self.manifest.quality))
        if here == there:
            return None
        return f"images were judged by {here} here, and by {there} there: they may differ for that"

    def differing_files(self, ours: BundleManifest) -> list[str]:
        """Files of graphs and weights that only one of both bundles has, or with other bytes."""
        here, there = (
            {
                name: entry
                for name, entry in manifest.files.items()
                if name.split("/", 1)[0] in manifest.engines
            }
            for manifest in (ours, self.manifest)
        )
        return sorted(name for name in {*here, *there} if here.get(name) != there.get(name))


def _judges(quality: Quality) -> str:
    """The metrics that images were judged by, with the networks of distances."""
    beside = any(image.features is not None for image in quality.images)
    names: dict[Metric, str] = {
        "psnr": METRIC_NAMES["psnr"],
        "lpips": quality.metric,
        "features": STAND_IN if beside else quality.metric,
    }
    return " and ".join(names[gate.metric] for gate in quality.judged_by)
