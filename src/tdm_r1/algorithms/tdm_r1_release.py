"""TDM-R1 as its authors released it for Stable Diffusion 3.5 Medium, where paper and release differ.

The same roles as `tdm_r1`, another loop: every gradient of an iteration is accumulated into one update of each role;
the surrogate is held near its reference in three ways and used with guidance; guidance is one more reward beside a KL
to the unguided teacher. Written from a description of the release, not from its code. Most choices are settings
(`ReleaseConfig`), with the paper's or our choice as the alternative; `docs/method.md` has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import flow, losses, processes, release, solvers
from ..core.advantages import group_advantages
from ..core.randomness import Normal
from ..models.protocol import Conditioning, guided
from ..models.roles import Roles
from ..models.specification import Average, Role, RoleSpec, trailing, warm_up
from .metrics import Stopwatch, Sums, mean_of_each
from .optimizer import Optimizer
from .optimizer_settings import OptimizerConfig
from .protocol import Algorithm, Batch, Evaluations, Step
from .rollout import TIME_GAP, Draw, Renoised, Rollout, roll_out
from .settings import AlgorithmSettings, check_release
from .surrogate import preference_accuracy
from .tdm import generator_and_fake

OLD = "surrogate_old"  # an average of phi that trails by less than one update, with a decay of at most
OLD_DECAY = 0.3


class TDMR1Release(Algorithm):
    """Samples of one prompt (a group) are consecutive rows throughout, and a micro-batch holds whole groups."""

    check = staticmethod(check_release)
    one_update_at_the_end = True

    def __init__(self, roles: Roles, empty: Conditioning, settings: AlgorithmSettings) -> None:
        super().__init__(roles, empty, settings)
        self.config, self.sampler = settings.release, settings.sampler
        self.group = settings.batch.group
        self.micro_batch = settings.batch.micro_batch // self.group * self.group
        self.block = self.config.time_block or self.group
        own = self.optimizer_settings(settings).items()
        self.optimizers = {role: Optimizer(roles.parameters(role), c, total=settings.iterations) for role, c in own}

    def step(self, batch: Batch) -> Step:
        """One iteration on P prompts with groups of G samples."""
        c, noise, seconds = self.config, batch.noise, Stopwatch()
        with seconds("rollout"):
            rollout = self.roll_out(batch)
        rewards = yield rollout.trajectory.final
        groups = group_advantages(rewards.reshape(-1, batch.group), deviation=c.deviation, clip=c.advantage_clip)
        advantage = groups.advantage.flatten().to(batch.x_1)

        found = []
        for i in torch.randperm(self.sampler.steps, generator=noise)[: c.trained_steps]:
            index = i.expand(len(rollout))
            with seconds("fake"):
                metrics = self.fit_fake(rollout, index, noise)
            with seconds("surrogate"):
                metrics |= self.fit_surrogate(rollout, advantage, noise)
            with seconds("generator"):
                metrics |= self.fit_generator(rollout, index, noise)
            found.append(metrics)
        return groups.metrics(rewards) | mean_of_each(found) | self.update() | seconds.read()

    def roll_out(self, batch: Batch) -> Rollout:
        """The generator's trajectories, keeping every x_{t_k}."""
        return roll_out(
            self.roles,
            Role.GENERATOR,
            batch.conditioning,
            batch.x_1,
            self.sampler,
            batch.noise,
            micro_batch=self.micro_batch,
        )

    # -------------------------------------------------------------------------------------- gradients

    def fit_fake(self, rollout: Rollout, index: Tensor, noise: torch.Generator) -> dict[str, float]:
        """Eq. 1 at the steps ``index`` [B], towards the step's clean prediction; kept near the teacher."""
        c, sums, n = self.config, Sums(), len(rollout)
        clean, x_s = arrival(rollout.trajectory, index)
        draw = self.draw(index, x_s, 0.0, noise)
        for rows in rollout.micro_batches(self.micro_batch, group=self.group):
            here, text = draw.rows(rows), rollout.conditioning.rows(rows)
            v_teacher = self.velocity(Role.TEACHER, here, text)
            with self.roles.use(Role.FAKE) as velocity:
                v = velocity(here.x_t, here.t, text)
                if c.fake_target == "clean":
                    error = losses.squared_error(v, release.clean_target(clean[rows], here.x_t, here.t))
                else:
                    error = losses.denoising(v, here.x_t, here.eps, here.s, here.t)
                apart = losses.squared_error(v, v_teacher)
                ((error + c.fake_anchor * apart).sum() / (n * c.trained_steps)).backward()
            sums.add("fake/loss", error.sum(), 1 / n)
            sums.add("fake/distance_from_teacher", apart.sum(), 1 / n)
        return sums.read()

    def fit_surrogate(self, rollout: Rollout, advantage: Tensor, noise: torch.Generator) -> dict[str, float]:
        """Eq. 8 and 9: the sigmoid's slope times A_i l_phi,i, held where a sample has moved far enough."""
        c, sums, implicit, n = self.config, Sums(), [], len(rollout)
        index = self.draw_steps(n, noise)
        x_s = rollout.trajectory.at(index + 1)
        draw = self.draw(index, x_s, c.surrogate_low, noise, shared=c.shared_noise)
        for rows in rollout.micro_batches(self.micro_batch, group=self.group):
            here, text, a = draw.rows(rows), rollout.conditioning.rows(rows), advantage[rows]
            target = release.velocity_back_to(x_s[rows], here.eps, here.s, here.t)
            v_ref = self.velocity(self.reference, here, text)
            v_old = self.velocity(OLD, here, text) if c.clip else None
            with self.roles.use(Role.SURROGATE) as velocity:
                v = velocity(here.x_t, here.t, text)
                terms, measured = self.surrogate_terms(v, v_ref, v_old, target, a, here.index)
                (terms.sum() / (n * c.trained_steps)).backward()
            implicit.append(measured.pop("implicit_reward"))
            for name, value in measured.items():
                sums.add(f"surrogate/{name}", value.sum(), 1 / n)
        accuracy = preference_accuracy(processes.gather(torch.cat(implicit), n, self.group), advantage, self.group)
        return sums.read() | {"surrogate/preference_accuracy": accuracy}

    def surrogate_terms(
        self, v: Tensor, v_ref: Tensor, v_old: Tensor | None, target: Tensor, advantage: Tensor, index: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each sample of whole groups, [B], and what is measured of it."""
        c = self.config
        loss, loss_ref = (losses.squared_error(a, target) for a in (v, v_ref))
        gap = losses.squared_error(v, v_ref)
        with torch.no_grad():  # slope and holds are constants of the loss
            distance = gap.reshape(-1, self.block).mean(1).repeat_interleave(self.block)
            by_ratio = by_distance = torch.zeros_like(advantage, dtype=torch.bool)
            if c.clip is not None and v_old is not None:
                by_ratio = losses.held_by_ratio(loss, losses.squared_error(v_old, target), advantage, c.clip)
            if c.distance_limit is not None:
                by_distance = release.held_by_distance(loss, loss_ref, advantage, distance, c.distance_limit)
            held = by_ratio | by_distance
            slope = torch.full_like(loss, 0.5)
            if c.loss == "sigmoid":
                slope = losses.group_slope(loss, loss_ref, advantage, self.group, c.beta)
            weight = (index + 1).to(loss) / self.sampler.steps if c.step_weights == "late" else torch.ones_like(loss)
        terms = weight * slope * advantage * torch.where(held, loss.detach(), loss) + c.anchor * gap
        return terms, {
            "implicit_reward": (loss_ref - loss).detach(),
            "loss": terms,
            "distance_from_reference": gap,
            "held_by_ratio": by_ratio,
            "held_by_distance": by_distance,
        }

    def fit_generator(self, rollout: Rollout, index: Tensor, noise: torch.Generator) -> dict[str, float]:
        """Eq. 10 and 11 at the steps ``index`` [B]: KL and guidance at one t, the surrogate's reward at another."""
        c, sums, n = self.config, Sums(), len(rollout)
        clean, x_s = arrival(rollout.trajectory, index)
        for_kl = self.draw(index, x_s, 0.0, noise)
        for_reward = self.draw(index, x_s, c.reward_low, noise, shared=c.shared_noise)
        rewarded = c.rewarded_steps is None or int(index[0]) < c.rewarded_steps
        for rows in rollout.micro_batches(self.micro_batch, group=self.group):
            text, i = rollout.conditioning.rows(rows), index[rows]
            kl, norm = self.kl_part(clean[rows], for_kl.rows(rows), text, rewarded=rewarded)
            direction = kl / norm
            if rewarded:
                reward, own_norm = self.reward_part(clean[rows], for_reward.rows(rows), text)
                reward = reward / (own_norm if c.normalizer == "each" else norm)
                direction = direction + reward
                sums.add("generator/reward_part", reward.abs().flatten(1).mean(1).sum(), 1 / n)
            with self.roles.use(Role.GENERATOR) as velocity:  # only the step k+1 -> k, from the stored x_{t_{k+1}}
                x, t = rollout.trajectory.rows(rows).at(i), rollout.trajectory.time(i)
                x0 = flow.x0_from_v(velocity(x, t, text), x, t)
                (losses.follow(x0, direction).sum() / (n * c.trained_steps)).backward()
            sums.add("generator/kl_part", (kl / norm).abs().flatten(1).mean(1).sum(), 1 / n)
        return sums.read()

    @torch.no_grad()  # the direction of Eq. 2 and 11 is a stop-gradient
    def kl_part(self, clean: Tensor, draw: Renoised, text: Conditioning, *, rewarded: bool) -> tuple[Tensor, Tensor]:
        """KL to the teacher with guidance, and its normaliser; at steps without reward ``tdm_weight`` times TDM."""
        c, x_t, t = self.config, draw.x_t, draw.t
        both = Conditioning.join([self.empty.expand(len(x_t)), text])
        with self.roles.use(Role.TEACHER) as velocity:
            v_uncond, v_cond = velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        of = (self.velocity(Role.FAKE, draw, text), v_cond, v_uncond)
        fake, cond, uncond = (flow.x0_from_v(v, x_t, t) for v in of)
        as_reward = rewarded and c.kl == "unguided"
        weight = c.tdm_weight if as_reward else 1.0
        kl, x0_teacher = release.kl_direction(fake, cond, uncond, guidance=c.teacher_guidance, weight=weight)
        norm = losses.magnitude(clean, x0_teacher, floor=c.normalizer_floor)
        return (kl if rewarded else c.tdm_weight * kl), flow.expand(norm, kl)

    @torch.no_grad()  # the direction of Eq. 2 and 11 is a stop-gradient
    def reward_part(self, clean: Tensor, draw: Renoised, text: Conditioning) -> tuple[Tensor, Tensor]:
        """(1 - tdm_weight) times the direction in which the implicit reward falls, and its normaliser: phi with
        guidance, its reference without."""
        c = self.config
        with self.roles.use(Role.SURROGATE) as velocity:
            v_phi = guided(velocity, self.empty, c.surrogate_guidance)(draw.x_t, draw.t, text)
        v_ref = self.velocity(self.reference, draw, text)
        x0_phi, x0_ref = (flow.x0_from_v(v, draw.x_t, draw.t) for v in (v_phi, v_ref))
        norm = losses.magnitude(clean, x0_phi, floor=c.normalizer_floor)
        return (1 - c.tdm_weight) * losses.reward_direction(x0_phi, x0_ref), flow.expand(norm, x0_phi)

    @torch.no_grad()  # a constant of every loss that it stands in
    def velocity(self, role: str, draw: Renoised, text: Conditioning) -> Tensor:
        """A role's velocity at a draw's points, without gradient."""
        with self.roles.use(role) as velocity:
            return velocity(draw.x_t, draw.t, text)

    # -------------------------------------------------------------------------------------- draws

    def draw(self, index: Tensor, x_s: Tensor, low: float, noise: torch.Generator, *, shared: bool = False) -> Draw:
        """Re-noised points of ``x_s`` [B, ...], which the steps ``index`` [B] arrive at.

        t is shared inside blocks, uniform in unshifted time from max(s, ``low``); noise is shared inside groups if
        ``shared``.
        """
        grid = flow.few_step_grid(self.sampler.steps, self.sampler.shift)
        u_s = 1 - (index[:: self.block] + 1) / self.sampler.steps
        t = release.unshifted_uniform(u_s.clamp_min(low), shift=self.sampler.shift, gap=TIME_GAP, noise=noise)
        t = t.repeat_interleave(self.block).to(x_s)
        n = self.group if shared else 1
        return Draw(index, grid.to(x_s)[index + 1], t, x_s, Normal.drawn(noise, x_s.shape[1:], shared=n))

    def draw_steps(self, n: int, noise: torch.Generator) -> Tensor:
        """The surrogate's steps of ``n`` samples, [n], one for each block; later ones are likelier where weighted."""
        steps = self.sampler.steps
        weights = torch.arange(1.0, steps + 1) if self.config.step_weights == "late" else torch.ones(steps)
        drawn = torch.multinomial(weights, n // self.block, replacement=True, generator=noise)
        return drawn.repeat_interleave(self.block)

    # -------------------------------------------------------------------------------------- updates and state

    def update(self) -> dict[str, float]:
        """One update of each role from what has been accumulated; the averages follow."""
        metrics: dict[str, float] = {}
        for role, optimizer in self.optimizers.items():
            metrics |= {f"{role}/{name}": value for name, value in optimizer.step().items()}
            self.roles.update_averages(role, updates=optimizer.updates)
        return metrics

    @property
    def reference(self) -> Role:
        return Role.TEACHER if self.config.reference == "static" else Role.REFERENCE

    def state(self) -> dict[str, Any]:
        return {str(role): optimizer.state() for role, optimizer in self.optimizers.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for role, optimizer in self.optimizers.items():
            optimizer.load_state(state[str(role)])

    # -------------------------------------------------------------------------------------- declarations

    @staticmethod
    def declare_roles(settings: AlgorithmSettings) -> tuple[RoleSpec, ...]:
        """Generator, fake score, surrogate, the generator's average; phi's, where clip and reference need them."""
        c, weights = settings.release, settings.model.roles
        averages = {OLD: Average(Role.SURROGATE, OLD_DECAY, ramp=trailing)} if c.clip else {}
        if c.reference == "dynamic":
            averages[Role.REFERENCE] = Average(Role.SURROGATE, c.reference_decay)
        ema = Average(Role.GENERATOR, c.generator_ema_decay, ramp=warm_up)
        return (
            *generator_and_fake(weights, ema, (Role.FAKE,)),
            RoleSpec(
                Role.SURROGATE,
                host="teacher",
                trained=True,
                weights=weights,
                starts_from="surrogate_lora",
                exported_as="lora_surrogate",
            ),
            *(RoleSpec(name, host="teacher", average=a, weights=weights) for name, a in averages.items()),
        )

    @staticmethod
    def optimizer_settings(settings: AlgorithmSettings) -> dict[str, OptimizerConfig]:
        c = settings.release
        return {Role.FAKE: c.fake, Role.SURROGATE: c.surrogate, Role.GENERATOR: c.generator}

    @staticmethod
    def evaluations(settings: AlgorithmSettings) -> dict[str, Evaluations]:
        c, b = settings.release, settings.batch
        scored = b.prompts * b.group
        trained = c.trained_steps * scored
        reward = 1 + (1 if c.surrogate_guidance == 1 else 2)
        return {
            "rollout": Evaluations(settings.sampler.steps * scored),
            "fake score": Evaluations(trained, trained, Role.FAKE),
            "surrogate": Evaluations((1 + bool(c.clip)) * trained, trained, Role.SURROGATE),
            "generator": Evaluations((3 + reward) * trained, trained, Role.GENERATOR, at_once=2),
        }


def arrival(trajectory: solvers.Trajectory, index: Tensor) -> tuple[Tensor, Tensor]:
    """The clean predictions of the steps ``index`` [B], and where Euler's step arrives with them, whatever the solver.

    Weights move at an iteration's end alone, so what the rollout stored is what the generator predicts now.
    """
    clean = trajectory.clean_at(index)
    times = trajectory.time(index), trajectory.time(index + 1)
    return clean, solvers.euler_step(clean, trajectory.at(index), *times)
