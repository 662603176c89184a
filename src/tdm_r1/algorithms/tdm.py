"""TDM: trajectory distribution matching (arXiv 2503.06674), the distillation below TDM-R1.

One iteration: roll the generator out along its deterministic few-step trajectory; train the fake score on re-noised
points of it (Eq. 1); move every point of the trajectory along s_psi - s_fake (Eq. 2). `TDM.fit_generator` takes the
reward's part of the direction as an argument: that is all that TDM-R1 adds to it.

Departures from the paper: the loss acts on the clean prediction of the step (as in the authors' code for PixArt),
with DMD's normaliser; no Huber loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .. import flow, losses, solvers
from ..backbones import Conditioning, guided, in_parts
from ..errors import UserError
from ..roles import Role, Roles
from ..settings import SHAPES_CHECKPOINT


class SamplerConfig(BaseModel):
    """The few-step sampler, in training and afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(4, ge=1, description="Forward evaluations an image, K. Published.")
    shift: float = Field(3.0, gt=0, description="Shift of the grid towards noise. Ours: SD3's own.")
    solver: solvers.Solver = Field("euler", description="euler, dpm (Flow-DPM-Solver, published) or stochastic.")


class OptimizerConfig(BaseModel):
    """AdamW of one role."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = Field((0.0, 0.95), description="From a neighbour (TDM, PixArt).")
    weight_decay: float = Field(0.0, ge=0, description="Ours.")
    max_grad_norm: float = Field(1.0, gt=0, description="Ours.")
    warmup_steps: int = Field(10, ge=1, description="Linear warm-up. Ours.")
    decay_share: float = Field(
        0.0, ge=0, le=1, description="Last share of the run in which the rate falls linearly to zero. Ours."
    )
    eight_bit: bool = Field(
        False,
        description="AdamW's averages in 8 bits (bitsandbytes): for full weights, not worth it for LoRA. Ours.",
        json_schema_extra=SHAPES_CHECKPOINT,
    )


NoiseRange = Literal["to_noise", "interval"]
Points = Literal["all", "earlier", "final"]  # of a trajectory: every x_{t_k}, those before x_0, x_0


class TDMConfig(BaseModel):
    """Settings of TDM. Those of the mini recipes are measured in docs/log.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generator: OptimizerConfig = OptimizerConfig(learning_rate=2e-4)
    fake: OptimizerConfig = OptimizerConfig(learning_rate=4e-4)
    fake_steps: int = Field(1, ge=1, description="Fake-score updates per generator update. Ours.")
    teacher_guidance: float = Field(3.0, ge=1, description="Guidance scale of the teacher, 1 for none. Ours.")
    generator_ema_decay: float = Field(0.98, ge=0, lt=1, description="Of the weights that are exported. Ours.")
    fake_scores: Literal["one", "two"] = Field(
        "one",
        json_schema_extra=SHAPES_CHECKPOINT,
        description="one: a fake score of all points of the trajectory (TDM). two: x_0 has its own, which sees what "
        "the final samples alone have become. Ours, docs/method.md.",
    )
    noise_range: NoiseRange = Field(
        "to_noise",
        description="t of the fake score and the KL part, drawn in [t_k, 1) or in [t_k, t_{k+1}). A neighbour (TDM) "
        "has both.",
    )
    normalizer_floor: float = Field(0.05, gt=0, description="Least value of DMD's normaliser. Ours.")


@dataclass(frozen=True)
class Rollout:
    """Trajectories of B samples and the prompts that they were made for."""

    trajectory: solvers.Trajectory
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.conditioning)

    def rows(self, rows: Tensor) -> Rollout:
        """The samples in ``rows`` [N] (int64)."""
        t = self.trajectory
        points, clean = ([x[rows] for x in xs] for xs in (t.points, t.clean))
        return Rollout(solvers.Trajectory(t.grid, points, clean), self.conditioning.rows(rows))


@dataclass(frozen=True)
class Draw:
    """Points of a rollout, re-noised: x_t ~ q(x_t | x_{t_k}) with s = t_k. ``index`` i has grid[i] = t_{k+1}."""

    index: Tensor  # [B] in 0..K-1: the step whose result is x_s
    s: Tensor  # [B]
    t: Tensor  # [B]
    x_s: Tensor  # [B, C, H, W]
    x_t: Tensor
    eps: Tensor


RewardPart = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""``(x_t, t, conditioning) -> [B, C, H, W]``: the reward's part of the generator's direction."""

MAX_SKIPPED = 5  # updates
TIME_MAX = 0.99  # t is drawn below it where t_k is: at t = 1 every point of a trajectory is the same noise


class TDM:
    """The roles' optimizers and one method for each line of the algorithm.

    Args:
        iterations: of the whole run; learning rates that decay are stretched to it.
        micro_batch: samples that go through the network at once.
    """

    def __init__(
        self,
        roles: Roles,
        empty: Conditioning,
        sampler: SamplerConfig,
        config: TDMConfig,
        *,
        iterations: int,
        micro_batch: int,
    ) -> None:
        self.roles = roles
        self.empty = empty
        self.sampler = sampler
        self.config = config
        self.micro_batch = micro_batch
        self.optimizers = {
            Role.GENERATOR: Optimizer(roles.parameters(Role.GENERATOR), config.generator, total=iterations)
        } | {
            fake: Optimizer(roles.parameters(fake), config.fake, total=iterations * config.fake_steps)
            for fake in fake_roles(config)
        }

    def step(self, conditioning: Conditioning, x_1: Tensor, noise: torch.Generator) -> dict[str, float]:
        """One iteration of TDM: the whole algorithm."""
        rollout = self.roll_out(conditioning, x_1, noise)
        metrics: dict[str, float] = {}
        for _ in range(self.config.fake_steps):
            metrics |= self.fit_fake(rollout, noise)
        return metrics | self.fit_generator(rollout, noise)

    @torch.no_grad()  # the trajectory is data; only one step of it is re-run with gradient (fit_generator)
    def roll_out(
        self, conditioning: Conditioning, x_1: Tensor, noise: torch.Generator, role: Role = Role.GENERATOR
    ) -> Rollout:
        """Samples from noise ``x_1`` [B, C, H, W], keeping every x_{t_k}."""
        trajectory = few_step_sample(self.roles, role, conditioning, x_1, self.sampler, noise, batch=self.micro_batch)
        return Rollout(trajectory, conditioning)

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
        draw = self.draw(rollout, noise, points=points, noise_range=self.config.noise_range)
        total = 0.0
        with self.roles.use(fake) as velocity:
            for rows in self.micro_batches(rollout):
                v = velocity(draw.x_t[rows], draw.t[rows], rollout.conditioning.rows(rows))
                loss = losses.denoising(v, draw.x_t[rows], draw.eps[rows], draw.s[rows], draw.t[rows])
                (loss.sum() / len(rollout)).backward()
                total += float(loss.detach().sum()) / len(rollout)
        return {f"{fake}/loss": total, f"{fake}/grad_norm": self.optimizers[fake].step()}

    def fit_generator(
        self, rollout: Rollout, noise: torch.Generator, reward_part: RewardPart | None = None
    ) -> dict[str, float]:
        """Eq. 2 and 10: moves one step of every trajectory along the distribution-level KL, and the reward's part."""
        trajectory, n = rollout.trajectory, len(rollout)
        index = torch.randint(trajectory.steps, (n,), generator=noise).to(trajectory.final.device)
        t = self._times(trajectory, index, noise, noise_range=self.config.noise_range)
        eps, eps_step = (torch.randn(trajectory.final.shape, generator=noise).to(t.device) for _ in range(2))
        kl_size, reward_size, alignment, scale = 0.0, 0.0, 0.0, 0.0
        for rows in self.micro_batches(rollout):
            part = rollout.rows(rows)
            i, c, here = index[rows], part.conditioning, part.trajectory
            last = (i - 1).clamp_min(0)
            t_now, t_next, x_now = here.time(i), here.time(i + 1), here.at(i)
            with self.roles.use(Role.GENERATOR) as velocity:  # only the step k+1 -> k, from the stored x_{t_{k+1}}
                x0 = flow.x0_from_v(velocity(x_now, t_now, c), x_now, t_now)
                with torch.no_grad():  # the direction of Eq. 2 and 11 is a stop-gradient
                    x_next = solvers.solver_step(
                        self.sampler.solver,
                        x0,
                        here.clean_at(last),
                        x_now,
                        here.time(last),
                        t_now,
                        t_next,
                        eps_step[rows],
                    )
                    x_t = flow.renoise(x_next, eps[rows], t_next, t[rows])
                    kl, x0_teacher = self._matching_direction(x_t, t[rows], c, i)
                    reward = reward_part(x_t, t[rows], c) if reward_part else torch.zeros_like(kl)
                    norm = losses.magnitude(x0, x0_teacher, floor=self.config.normalizer_floor)
                    direction = (kl + reward) / flow.expand(norm, kl)
                (losses.follow(x0, direction).sum() / n).backward()
            share = len(rows) / n
            kl_size += share * float((kl.abs().flatten(1).mean(1) / norm).mean())
            reward_size += share * float((reward.abs().flatten(1).mean(1) / norm).mean())
            alignment += share * float(nn.functional.cosine_similarity(kl.flatten(1), reward.flatten(1)).mean())
            scale += share * float(norm.mean())
        metrics = {
            "generator/kl_part": kl_size,
            "generator/normalizer": scale,
            "generator/grad_norm": self.optimizers[Role.GENERATOR].step(),
        }
        if reward_part:
            metrics |= {"generator/reward_part": reward_size, "generator/kl_reward_cosine": alignment}
        self.roles.average(Role.GENERATOR_EMA, Role.GENERATOR, self.config.generator_ema_decay)
        return metrics

    def _matching_direction(self, x_t: Tensor, t: Tensor, c: Conditioning, index: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 2's direction at (x_t, t), the teacher with its guidance; and the teacher's clean prediction."""
        with self.roles.use(Role.TEACHER) as velocity:
            teacher = guided(velocity, self.empty, self.config.teacher_guidance)
            x0_teacher = flow.x0_from_v(teacher(x_t, t, c), x_t, t)
        x0_fake = flow.x0_from_v(self.fake_velocity(x_t, t, c, index), x_t, t)
        return losses.distribution_matching(x0_fake, x0_teacher), x0_teacher

    def fake_velocity(self, x_t: Tensor, t: Tensor, c: Conditioning, index: Tensor) -> Tensor:
        """The fake score's velocity: of each sample by the one that knows its point of the trajectory, ``index``."""
        if self.config.fake_scores == "one":
            with self.roles.use(Role.FAKE) as velocity:
                return velocity(x_t, t, c)
        final = index == self.sampler.steps - 1
        v = torch.empty_like(x_t)
        for fake, knows in ((Role.FAKE, ~final), (Role.FAKE_FINAL, final)):
            rows = knows.nonzero()[:, 0]
            if len(rows):
                with self.roles.use(fake) as velocity:
                    v[rows] = velocity(x_t[rows], t[rows], c.rows(rows))
        return v

    # -------------------------------------------------------------------------------------- drawing

    def draw(
        self,
        rollout: Rollout,
        noise: torch.Generator,
        *,
        group_size: int = 1,
        points: Points = "all",
        noise_range: NoiseRange = "to_noise",
        time_range: tuple[float, float] = (0.0, 1.0),
    ) -> Draw:
        """Draws k, t >= t_k and noise for every sample, shared inside consecutive groups of ``group_size``.

        ``points`` keeps to x_0, the trajectory's end, or to those before it; ``time_range`` narrows t.
        """
        n_groups = len(rollout) // group_size
        trajectory = rollout.trajectory
        device = trajectory.final.device  # drawn on the generator's device, the CPU: the same on every machine
        last = trajectory.steps - 1
        low, high = {"all": (0, last), "earlier": (0, last - 1), "final": (last, last)}[points]
        index = torch.randint(low, high + 1, (n_groups,), generator=noise).to(device)
        eps = torch.randn((n_groups, *trajectory.final.shape[1:]), generator=noise).to(device)
        t = self._times(trajectory, index, noise, noise_range=noise_range, time_range=time_range)
        index, t, eps = (a.repeat_interleave(group_size, 0) for a in (index, t, eps))
        s, x_s = trajectory.time(index + 1), trajectory.at(index + 1)
        return Draw(index, s, t, x_s, flow.renoise(x_s, eps, s, t), eps)

    def _times(
        self,
        trajectory: solvers.Trajectory,
        index: Tensor,
        noise: torch.Generator,
        *,
        noise_range: NoiseRange,
        time_range: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """t >= t_k of each sample, where grid[index + 1] = t_k; kept off t_k itself and off 1, and inside
        ``time_range`` where t_k allows it."""
        low = trajectory.time(index + 1)
        high = trajectory.time(index) if noise_range == "interval" else torch.ones_like(low)
        low = torch.where(high > time_range[0], low.clamp_min(time_range[0]), low)
        high = torch.where(low < time_range[1], high.clamp_max(time_range[1]), high)
        high = torch.minimum(high, ((1 + low) / 2).clamp_min(TIME_MAX))  # a grid of many steps has t_k above TIME_MAX
        return flow.uniform(len(index), low + 0.02 * (high - low), high, generator=noise)

    def micro_batches(self, rollout: Rollout) -> Iterator[Tensor]:
        """Row indices of at most ``micro_batch`` samples at a time, where the samples are: a GPU waits for no copy."""
        yield from torch.arange(len(rollout), device=rollout.trajectory.final.device).split(self.micro_batch)

    def state(self) -> dict:
        return {str(role): optimizer.state() for role, optimizer in self.optimizers.items()}

    def load_state(self, state: dict) -> None:
        for role, optimizer in self.optimizers.items():
            optimizer.load_state(state[str(role)])


def fake_roles(config: TDMConfig) -> tuple[Role, ...]:
    """The roles that know the generator's own samples."""
    return (Role.FAKE,) if config.fake_scores == "one" else (Role.FAKE, Role.FAKE_FINAL)


def few_step_sample(
    roles: Roles,
    role: Role,
    c: Conditioning,
    x_1: Tensor,
    sampler: SamplerConfig,
    noise: torch.Generator | None,
    *,
    batch: int | None = None,
) -> solvers.Trajectory:
    """The few-step trajectory of ``role``, without gradients where the caller says so, ``batch`` samples at a time."""
    grid = flow.few_step_grid(sampler.steps, sampler.shift)

    def fresh(step: int) -> Tensor:
        return torch.randn(x_1.shape, generator=noise)

    with roles.use(role) as velocity:
        v = in_parts(velocity, batch or len(x_1))
        return solvers.sample(lambda x, t: v(x, t, c), x_1, grid, solver=sampler.solver, noise=fresh)


class Optimizer:
    """AdamW with warm-up, final decay and clipping for one role; `step` returns the gradient's norm before clipping.

    An update whose gradient is not finite is skipped; `MAX_SKIPPED` of them in a row raise FloatingPointError.

    Args:
        total: updates of the whole run, which the decay is a share of.
    """

    def __init__(self, parameters: list[nn.Parameter], config: OptimizerConfig, *, total: int) -> None:
        self.config = config
        self.parameters = parameters
        self.total = total
        self.steps = 0
        self.skipped = 0  # updates in a row whose gradient was not finite
        kind: Callable[..., torch.optim.Optimizer] = _eight_bit_adamw() if config.eight_bit else torch.optim.AdamW
        self.adamw = kind(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)

    def step(self) -> float:
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        self.steps += 1
        for group in self.adamw.param_groups:
            group["lr"] = self.rate()
        finite = math.isfinite(norm)
        if finite:
            self.adamw.step()
            torch.autograd.graph.increment_version(self.parameters)  # fused kernels do not; `Roles` goes by it
        self.adamw.zero_grad(set_to_none=True)
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped == MAX_SKIPPED:
            raise FloatingPointError(
                f"the gradient was not finite in {MAX_SKIPPED} updates in a row: the run has diverged; go on from an "
                "earlier checkpoint (--resume --from ITERATION) with a lower learning rate or balance.scale"
            )
        return norm

    def rate(self) -> float:
        """The learning rate of update number ``steps``."""
        c = self.config
        left = self.total + 1 - self.steps
        decay = left / (c.decay_share * self.total) if c.decay_share else 1.0
        return c.learning_rate * max(min(self.steps / c.warmup_steps, decay, 1.0), 0.0)

    def state(self) -> dict:
        return {"adamw": self.adamw.state_dict(), "steps": self.steps}

    def load_state(self, state: dict) -> None:
        """Goes on from `state` with the settings of ``config``: AdamW's own loading would bring the saved ones back."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.adamw.param_groups]
        self.adamw.load_state_dict(state["adamw"])
        for group, own in zip(self.adamw.param_groups, settings, strict=True):
            group.update(own)
        self.steps = state["steps"]


def _eight_bit_adamw() -> Callable[..., torch.optim.Optimizer]:
    """bitsandbytes' AdamW. Raises UserError where it is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("eight_bit = True needs bitsandbytes: pip install 'tdm-r1[eight-bit]'") from error
    return AdamW8bit
