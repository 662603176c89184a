"""TDM: trajectory distribution matching (arXiv 2503.06674), the distillation below TDM-R1.

One iteration: roll the generator out along its deterministic few-step trajectory; train the fake score on re-noised
points of it (Eq. 1); move every point of the trajectory along s_psi - s_fake (Eq. 2). `TDM.fit_generator` takes the
reward's part of the direction as an argument: that is all that TDM-R1 adds to it.

Departures from the paper: the loss acts on the clean prediction of the step (as in the authors' code for PixArt),
with DMD's normaliser; no Huber loss; by default x_0 has a fake score of its own, and each has two updates an iteration.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..core import flow, losses, processes, solvers
from ..core.randomness import Normal
from ..models.protocol import Conditioning, guided_and_not
from ..models.roles import Roles
from ..models.specification import EVALUATED, AddedDelta, Average, Role, RoleSpec
from .metrics import Stopwatch, Sums, mean_of_each
from .optimizer import Optimizer
from .optimizer_settings import OptimizerConfig
from .protocol import Algorithm, Batch, Evaluations, Step
from .rollout import Points, Rollout, draw_points, draw_times, roll_out
from .settings import AlgorithmSettings, TDMConfig, check_tdm_alone


class RewardPart(Protocol):
    """The reward's part of the generator's direction."""

    def __call__(self, x_t: Tensor, t: Tensor, c: Conditioning, v_teacher: Tensor | None = None, /) -> Tensor:
        """At x_t [B, C, H, W], t [B]; the same shape as x_t.

        Args:
            v_teacher: the teacher's velocity there without guidance, where it is known.
        """


class TDM(Algorithm):
    """The optimizers of generator and fake scores, and one method for each line of the algorithm."""

    check = staticmethod(check_tdm_alone)

    def __init__(self, roles: Roles, empty: Conditioning, settings: AlgorithmSettings) -> None:
        super().__init__(roles, empty, settings)
        c, n = settings.tdm, settings.iterations
        self.config, self.sampler, self.micro_batch = c, settings.sampler, settings.batch.micro_batch
        self.optimizers = {
            role: Optimizer(roles.parameters(role), own, total=n if role == Role.GENERATOR else n * c.fake_steps)
            for role, own in TDM.optimizer_settings(settings).items()
        }

    def step(self, batch: Batch) -> Step:
        """One iteration of TDM: the whole algorithm."""
        seconds = Stopwatch()
        with seconds("rollout"):
            rollout = self.roll_out(batch)
        with seconds("fake"):
            metrics = mean_of_each([self.fit_fake(rollout, batch.noise) for _ in range(self.config.fake_steps)])
        with seconds("generator"):
            metrics |= self.fit_generator(rollout, batch.noise)
        yield from ()  # nothing is to be scored
        return metrics | seconds.read()

    def roll_out(self, batch: Batch) -> Rollout:
        """The generator's trajectories, keeping every x_{t_k}."""
        return self._roll_out(batch.conditioning, batch.x_1, batch.noise)

    def roll_out_for_kl(self, batch: Batch) -> list[Rollout]:
        """The same of the samples without reward; empty if there are none."""
        return [] if batch.kl is None or batch.kl_x_1 is None else [self._roll_out(batch.kl, batch.kl_x_1, batch.noise)]

    def _roll_out(self, c: Conditioning, x_1: Tensor, noise: torch.Generator) -> Rollout:
        return roll_out(self.roles, Role.GENERATOR, c, x_1, self.sampler, noise, micro_batch=self.micro_batch)

    def fit_fake(self, rollout: Rollout, noise: torch.Generator) -> dict[str, float]:
        """Eq. 1: the fake score learns to denoise the generator's own samples, at all K steps.

        Where x_0 has a fake score of its own, each of the two learns from half of the samples.
        """
        if self.config.fake_scores == "one":
            return self.fit_fake_at("all", Role.FAKE, rollout, noise)
        earlier, final = torch.randperm(len(rollout), generator=noise).chunk(2)
        metrics = self.fit_fake_at("earlier", Role.FAKE, rollout.rows(earlier), noise)
        return metrics | self.fit_fake_at("final", Role.FAKE_FINAL, rollout.rows(final), noise)

    def fit_fake_at(self, points: Points, fake: Role, rollout: Rollout, noise: torch.Generator) -> dict[str, float]:
        """Eq. 1 for the fake score ``fake`` at ``points`` alone."""
        draw = draw_points(rollout, noise, points=points, noise_range=self.config.noise_range)
        n, sums = len(rollout), Sums()
        with self.roles.use(fake) as velocity:
            for rows in rollout.micro_batches(self.micro_batch):
                here = draw.rows(rows)
                v = velocity(here.x_t, here.t, rollout.conditioning.rows(rows))
                loss = losses.denoising(v, here.x_t, here.eps, here.s, here.t)
                (loss.sum() / n).backward()
                sums.add(f"{fake}/loss", loss.sum(), 1 / n)
        return sums.read() | _named(fake, self.optimizers[fake].step())

    def fit_generator(
        self,
        rollout: Rollout,
        noise: torch.Generator,
        reward_part: RewardPart | None = None,
        rewarded: int | None = None,
    ) -> dict[str, float]:
        """Eq. 2 and 10: moves one step of every trajectory along the distribution-level KL, and the reward's part.

        Args:
            rewarded: the reward's part is for the first so many samples; None for all.
        """
        trajectory, n, sums = rollout.trajectory, len(rollout), Sums()
        rewarded = (n if rewarded is None else rewarded) if reward_part else 0
        index = torch.randint(trajectory.steps, (n,), generator=noise)
        t = draw_times(trajectory, index, noise, noise_range=self.config.noise_range)
        for_t, for_step = (Normal.drawn(noise, trajectory.final.shape[1:]) for _ in range(2))
        for rows in rollout.micro_batches(self.micro_batch):
            part = rollout.rows(rows)
            i, c, here = index[rows], part.conditioning, part.trajectory
            eps, eps_step = (normal[rows].to(t.device) for normal in (for_t, for_step))
            with self.roles.use(Role.GENERATOR) as velocity:  # only the step k+1 -> k, from the stored x_{t_{k+1}}
                x0 = flow.x0_from_v(velocity(here.at(i), here.time(i), c), here.at(i), here.time(i))
                with torch.no_grad():  # the direction of Eq. 2 and 11 is a stop-gradient
                    x_t = flow.renoise(self._next(here, i, x0, eps_step), eps, here.time(i + 1), t[rows])
                    kl, x0_teacher, v_teacher = self.matching_direction(x_t, t[rows], c, i)
                    reward = torch.zeros_like(kl)
                    own = (rows < rewarded).nonzero()[:, 0]
                    if reward_part and (len(own) or processes.count() > 1):
                        reward[own] = reward_part(x_t[own], t[rows][own], c.rows(own), v_teacher[own])
                    norm = losses.magnitude(x0, x0_teacher, floor=self.config.normalizer_floor)
                    direction = (kl + reward) / flow.expand(norm, kl)
                (losses.follow(x0, direction).sum() / n).backward()
            if not rewarded:
                sums.add("generator/kl_part", (kl.abs().flatten(1).mean(1) / norm).sum(), 1 / n)
            sums.add("generator/normalizer", norm.sum(), 1 / n)
            if len(own):
                size, kl_size = (part[own].abs().flatten(1).mean(1) / norm[own] for part in (reward, kl))
                cosine = nn.functional.cosine_similarity(kl[own].flatten(1), reward[own].flatten(1))
                sums.add("generator/kl_part", kl_size.sum(), 1 / rewarded)  # of the same samples: their ratio counts
                sums.add("generator/reward_part", size.sum(), 1 / rewarded)
                sums.add("generator/kl_reward_cosine", cosine.sum(), 1 / rewarded)
        metrics = sums.read() | _named(Role.GENERATOR, self.optimizers[Role.GENERATOR].step())
        self.roles.update_averages(Role.GENERATOR, updates=self.optimizers[Role.GENERATOR].updates)
        return metrics

    def _next(self, here: solvers.Trajectory, i: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """x_{t_k}: the solver's step from the stored points of index ``i`` with the clean prediction ``x0``."""
        last = (i - 1).clamp_min(0)
        times = here.time(last), here.time(i), here.time(i + 1)
        return solvers.solver_step(self.sampler.solver, x0, here.clean_at(last), here.at(i), *times, eps)

    def matching_direction(
        self, x_t: Tensor, t: Tensor, c: Conditioning, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 2's direction at (x_t, t), the teacher with its guidance; the teacher's clean prediction; and its
        velocity without guidance, which is computed on the way."""
        with self.roles.use(Role.TEACHER) as velocity:
            v_guided, v_teacher = guided_and_not(velocity, self.empty, self.config.teacher_guidance)(x_t, t, c)
        x0_teacher = flow.x0_from_v(v_guided, x_t, t)
        x0_fake = flow.x0_from_v(self.fake_velocity(x_t, t, c, index), x_t, t)
        return losses.distribution_matching(x0_fake, x0_teacher), x0_teacher, v_teacher

    def fake_velocity(self, x_t: Tensor, t: Tensor, c: Conditioning, index: Tensor) -> Tensor:
        """The fake score's velocity: for each sample that of the role trained on its point of the trajectory."""
        if self.config.fake_scores == "one":
            with self.roles.use(Role.FAKE) as velocity:
                return velocity(x_t, t, c)
        final = index == self.sampler.steps - 1
        v = torch.empty_like(x_t)
        for fake, of in ((Role.FAKE, ~final), (Role.FAKE_FINAL, final)):
            rows = of.nonzero()[:, 0]
            if len(rows) or processes.count() > 1:  # all of them compute, or none
                with self.roles.use(fake) as velocity:
                    v[rows] = velocity(x_t[rows], t[rows], c.rows(rows))
        return v

    def state(self) -> dict[str, Any]:
        return {str(role): optimizer.state() for role, optimizer in self.optimizers.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for role, optimizer in self.optimizers.items():
            optimizer.load_state(state[str(role)])

    # -------------------------------------------------------------------------------------- declarations

    @staticmethod
    def declare_roles(settings: AlgorithmSettings) -> tuple[RoleSpec, ...]:
        return declared(settings)

    @staticmethod
    def optimizer_settings(settings: AlgorithmSettings) -> dict[str, OptimizerConfig]:
        c = settings.tdm
        return {Role.GENERATOR: c.generator, **dict.fromkeys(fake_roles(c), c.fake)}

    @staticmethod
    def evaluations(settings: AlgorithmSettings) -> dict[str, Evaluations]:
        everything = settings.batch.prompts * settings.batch.group
        return evaluations(settings, everything, reward=0)


def generator_and_fake(
    weights: Literal["lora", "full"],
    ema: Average,
    fakes: tuple[Role, ...],
    added: AddedDelta | None = None,
    exported: AddedDelta | None = None,
) -> tuple[RoleSpec, ...]:
    """The roles of TDM: the generator, its average ``ema``, and the fake scores.

    Args:
        added: what is added to each of them.
        exported: what is added to the averaged generator instead.
    """
    own = partial(RoleSpec, weights=weights)
    return (
        own(Role.GENERATOR, trained=True, added=added, starts_from="student_lora"),
        own(
            Role.GENERATOR_EMA, average=ema, added=exported or added, starts_from="student_lora", exported_as=EVALUATED
        ),
        *(
            own(
                fake,
                trained=True,
                added=added,
                starts_from="fake_lora",
                exported_as="lora_fake" if fake is Role.FAKE else None,
            )
            for fake in fakes
        ),
    )


def declared(
    c: AlgorithmSettings, added: AddedDelta | None = None, exported: AddedDelta | None = None
) -> tuple[RoleSpec, ...]:
    """`generator_and_fake` by the settings of TDM."""
    ema = Average(Role.GENERATOR, c.tdm.generator_ema_decay)
    return generator_and_fake(c.model.roles, ema, fake_roles(c.tdm), added, exported)


def fake_roles(config: TDMConfig) -> tuple[Role, ...]:
    """The roles that learn the score of the generator's own samples."""
    return (Role.FAKE,) if config.fake_scores == "one" else (Role.FAKE, Role.FAKE_FINAL)


def evaluations(c: AlgorithmSettings, trained: int, *, reward: int, beside: int = 0) -> dict[str, Evaluations]:
    """What rollout, fake score and generator cost.

    Args:
        trained: samples that are scored and trained on.
        reward: evaluations of the reward's part for each of them.
        beside: samples without reward.
    """
    teacher, everything = 1 if c.tdm.teacher_guidance == 1 else 2, trained + beside
    return {
        "rollout": Evaluations(c.sampler.steps * (c.batch.prompts * c.batch.group + beside)),
        "fake score": Evaluations(0, c.tdm.fake_steps * everything, Role.FAKE),
        "generator": Evaluations(
            (teacher + 1) * everything + reward * trained, everything, Role.GENERATOR, teacher, nested=True
        ),
    }


def _named(role: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{role}/{name}": value for name, value in metrics.items()}
