"""What samplers over x = alpha x_0 + sigma epsilon with alpha**2 + sigma**2 = 1, at whole training
timesteps, share."""

from __future__ import annotations

import numpy as np

from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, BetaConfig, Scheduler
from edgesd.runtime.schedulers.schedule import I64, Spacing


class PreservingScheduler(Scheduler):
    """Its noise levels are those of the training timesteps."""

    def _prepare(self, config: BetaConfig, zero_snr: bool = False) -> None:
        """Keep alphas_cumprod; `timesteps` as before any choice."""
        self._common = config
        self._table = config.table(zero_snr=zero_snr)
        self.timesteps = np.arange(len(self._table), dtype=np.int64)[::-1].copy()

    def _spaced(self, asked: Asked, spacing: Spacing) -> I64:
        """Timesteps [n] as they are asked for."""
        c = self._common
        if asked.timesteps is not None:
            return schedule.check_timesteps(asked.timesteps, c.num_train_timesteps)
        schedule.check_steps(asked.steps, c.num_train_timesteps)
        spaced = schedule.spaced_timesteps(
            spacing, c.num_train_timesteps, asked.steps, c.steps_offset
        )
        return np.asarray(spaced.round().astype(np.int64))

    def noise_level(self, i: int) -> tuple[float, float]:
        return schedule.signal_and_noise(schedule.alpha_at(self._table, int(self.timesteps[i])))
