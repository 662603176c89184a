"""Switching roles: isolation, restoration, gradients, starts and averages."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tdm_r1.algorithms.optimizer import Optimizer
from tdm_r1.algorithms.optimizer_settings import OptimizerConfig
from tdm_r1.models.create import create_roles
from tdm_r1.models.export import exported
from tdm_r1.models.lora_files import load_lora
from tdm_r1.models.pipeline import PipelineBackbone, load_backbone
from tdm_r1.models.protocol import Conditioning
from tdm_r1.models.roles import Roles
from tdm_r1.models.settings import LORA_TARGETS
from tdm_r1.models.specification import AddedDelta, Role, RoleSpec

OWN = (Role.GENERATOR, Role.GENERATOR_EMA, Role.FAKE, Role.SURROGATE, Role.REFERENCE)


def lora(rank: int = 4) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS))


def load(path: Path, *, dtype: torch.dtype = torch.float32) -> PipelineBackbone:
    return load_backbone(str(path), max_sequence_length=1, dtype=dtype, device="cpu")


def specs(
    names: Sequence[Role] = OWN, *, full: Sequence[Role] = (), added: Mapping[Role, AddedDelta] | None = None
) -> list[RoleSpec]:
    """The paper's roles, as TDM-R1 declares them."""
    return [
        RoleSpec(
            name,
            host="teacher" if name in (Role.SURROGATE, Role.REFERENCE) else "student",
            trained=name in (Role.GENERATOR, Role.FAKE, Role.SURROGATE),
            weights="full" if name in full else "lora",
            added=(added or {}).get(name),
        )
        for name in names
    ]


def lora_roles(
    student: PipelineBackbone, config: LoraConfig, names: Sequence[Role] = OWN, *, full=(), added=None, **options
) -> Roles:
    return create_roles(specs(names, full=full, added=added), student, config, **options)


def cast(kind: str, path: Path) -> tuple[Roles, PipelineBackbone]:
    backbone = load(path)
    match kind:
        case "full":
            return lora_roles(backbone, lora(), full=OWN), backbone
        case "mixed":
            return lora_roles(backbone, lora(), OWN, full=(Role.SURROGATE, Role.REFERENCE)), backbone
        case _:
            return lora_roles(backbone, lora(), OWN), backbone


def inputs(backbone: PipelineBackbone, n: int = 2):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, *backbone.latent_shape, generator=g)
    return x, torch.full((n,), 0.6), Conditioning.join(backbone.encode(["a red circle", "two crosses"][:n]))


def disturb(roles: Roles, role: Role) -> None:
    with torch.no_grad():
        for p in roles.parameters(role):
            p.add_(0.05 * torch.ones_like(p))


@pytest.mark.parametrize("kind", ["lora", "full", "mixed"])
def test_every_role_starts_as_the_teacher_and_differs_once_trained(kind: str, random_model: Path):
    roles, backbone = cast(kind, random_model)
    args = inputs(backbone)
    with torch.no_grad(), roles.use(Role.TEACHER) as velocity:
        teacher = velocity(*args)
    for role in OWN:
        with torch.no_grad(), roles.use(role) as velocity:
            torch.testing.assert_close(velocity(*args), teacher, rtol=0, atol=0)
    disturb(roles, Role.FAKE)
    for role, changed in [(Role.FAKE, True), (Role.GENERATOR, False), (Role.TEACHER, False)]:
        with torch.no_grad(), roles.use(role) as velocity:
            assert bool((velocity(*args) != teacher).any()) == changed


@pytest.mark.parametrize("kind", ["lora", "full", "mixed"])
def test_a_step_of_one_role_leaves_every_other_parameter_bitwise_alone(kind: str, random_model: Path):
    roles, backbone = cast(kind, random_model)
    before = {role: roles.state(role) for role in OWN}
    base = {n: p.detach().clone() for n, p in backbone.transformer.named_parameters() if "lora" not in n}
    optimizer = torch.optim.SGD(roles.parameters(Role.SURROGATE), lr=1.0)
    with roles.use(Role.SURROGATE) as velocity:
        velocity(*inputs(backbone)).square().mean().backward()
    optimizer.step()
    for role in OWN:
        same = all(torch.equal(p, before[role][n]) for n, p in roles.weights(role).items())
        assert same == (role is not Role.SURROGATE), role
    assert all(torch.equal(p, base[n]) for n, p in backbone.transformer.named_parameters() if n in base)


@pytest.mark.parametrize("kind", ["lora", "full", "mixed"])
def test_gradients_survive_visits_to_every_other_role(kind: str, random_model: Path):
    """Also when the backward runs after the switch, which peft's own flags would drop."""
    roles, backbone = cast(kind, random_model)
    for trained, visited in product((Role.GENERATOR, Role.FAKE, Role.SURROGATE), (*OWN, Role.TEACHER)):
        disturb(roles, trained)  # B starts at zero, where A has no gradient
        with roles.use(trained) as velocity:
            loss = velocity(*inputs(backbone)).square().mean()
        with torch.no_grad(), roles.use(visited) as velocity:
            velocity(*inputs(backbone))
        loss.backward()
        parameters = roles.parameters(trained)
        assert all(p.grad is not None for p in parameters) or kind == "full"
        assert sum(bool(p.grad.any()) for p in parameters if p.grad is not None) > 0.9 * len(parameters)
        for p in parameters:
            p.grad = None


def test_the_role_before_is_restored_after_an_error(random_model: Path):
    roles, backbone = cast("lora", random_model)
    disturb(roles, Role.FAKE)
    args = inputs(backbone)
    with torch.no_grad(), roles.use(Role.FAKE) as fake:
        want = fake(*args)
        with pytest.raises(RuntimeError, match="inside"), roles.use(Role.GENERATOR):
            raise RuntimeError("inside")
        torch.testing.assert_close(fake(*args), want, rtol=0, atol=0)


def test_a_velocity_is_its_roles_or_refuses(random_model: Path):
    """Never another role's, whichever was activated since."""
    roles, backbone = cast("lora", random_model)
    disturb(roles, Role.FAKE)
    args = inputs(backbone)
    with torch.no_grad(), roles.use(Role.GENERATOR) as generator:
        expected = generator(*args)
        with roles.use(Role.FAKE) as fake:
            assert (fake(*args) != expected).any()
            with pytest.raises(RuntimeError, match="velocity of role generator"):
                generator(*args)
        torch.testing.assert_close(generator(*args), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="velocity of role generator"):
        generator(*args)


@pytest.mark.parametrize("kind", ["lora", "full", "mixed"])
def test_the_teacher_has_no_weights_of_its_own(kind: str, random_model: Path):
    roles, _ = cast(kind, random_model)
    with pytest.raises(ValueError, match="teacher has no weights of its own"):
        roles.weights(Role.TEACHER)


def test_tensorfloat32_is_for_the_roles_alone(random_model: Path):
    """Rewards in the same process compute in float32."""
    roles, _ = cast("lora", random_model)
    roles.tf32 = True
    before = torch.get_float32_matmul_precision()
    assert before == "highest"
    with roles.use(Role.FAKE):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_gradient_reaches_only_trained_roles(random_model: Path):
    roles, _ = cast("lora", random_model)
    for role in OWN:
        flags = {p.requires_grad for p in roles.parameters(role)}
        assert flags == {role in (Role.GENERATOR, Role.FAKE, Role.SURROGATE)}, role
    with pytest.raises(ValueError, match="frozen backbone"):
        roles.parameters(Role.TEACHER)


def test_average_is_an_exponential_moving_average(random_model: Path):
    roles, _ = cast("lora", random_model)
    start = roles.state(Role.REFERENCE)
    disturb(roles, Role.SURROGATE)
    roles.average(Role.REFERENCE, Role.SURROGATE, 0.9)
    for name, p in roles.weights(Role.REFERENCE).items():
        torch.testing.assert_close(p.detach(), start[name] + 0.1 * 0.05)


def test_teacher_on_a_second_backbone_carries_surrogate_and_reference(random_model: Path):
    student, other = load(random_model), load(random_model)
    with torch.no_grad():
        for p in other.transformer.parameters():
            p.mul_(1.1)
    roles = lora_roles(student, lora(), OWN, teacher=other)
    args = inputs(student)
    out = {}
    for role in (*OWN, Role.TEACHER):
        with torch.no_grad(), roles.use(role) as velocity:
            out[role] = velocity(*args)
    for role in (Role.SURROGATE, Role.REFERENCE):
        torch.testing.assert_close(out[role], out[Role.TEACHER], rtol=0, atol=0)
    for role in (Role.FAKE, Role.GENERATOR_EMA):
        torch.testing.assert_close(out[role], out[Role.GENERATOR], rtol=0, atol=0)
    assert bool((out[Role.GENERATOR] != out[Role.TEACHER]).any())


def test_lora_round_trip_and_its_errors(random_model: Path, tmp_path: Path):
    roles, backbone = cast("lora", random_model)
    disturb(roles, Role.GENERATOR)
    backbone.save_lora(tmp_path / "saved", roles.state(Role.GENERATOR), lora())
    load_lora(roles, (Role.FAKE,), tmp_path / "saved", lora())
    for name, p in roles.weights(Role.FAKE).items():
        assert torch.equal(p, roles.weights(Role.GENERATOR)[name])
    with pytest.raises(ValueError, match=r"rank 4.*set model\.lora\.rank to 4 or more"):
        load_lora(roles, (Role.FAKE,), tmp_path / "saved", lora(rank=2))
    with pytest.raises(ValueError, match="no LoRA at"):
        load_lora(roles, (Role.FAKE,), tmp_path / "nowhere", lora())


def test_a_lora_starts_an_adapter_of_higher_rank_and_other_alpha(random_model: Path, tmp_path: Path):
    roles, backbone = cast("lora", random_model)
    disturb(roles, Role.GENERATOR)
    backbone.save_lora(tmp_path / "saved", roles.state(Role.GENERATOR), lora())
    wide_config = LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS))
    other = load(random_model)
    wide = lora_roles(other, wide_config, OWN)
    load_lora(wide, (Role.FAKE,), tmp_path / "saved", wide_config)
    with torch.no_grad(), roles.use(Role.GENERATOR) as velocity:
        expected = velocity(*inputs(backbone))
    with torch.no_grad(), wide.use(Role.FAKE) as velocity:
        torch.testing.assert_close(velocity(*inputs(other)), expected)
    new = [p[4:] for name, p in wide.weights(Role.FAKE).items() if "lora_A" in name]
    assert all(bool(rows.abs().sum(1).all()) for rows in new)  # the added ranks can learn


def test_merged_roles_are_the_same_roles(random_model: Path):
    """Merging changes rounding alone, follows updates, nests, and leaves the base bitwise as it was."""
    backbone = load(random_model)
    roles = lora_roles(backbone, lora(), OWN, merge=True)
    base = {n: p.detach().clone() for n, p in backbone.transformer.named_parameters() if "lora" not in n}
    args = inputs(backbone)
    for _ in range(2):
        disturb(roles, Role.FAKE)
        with roles.use(Role.FAKE) as velocity:
            want = velocity(*args).detach()
        with torch.no_grad(), roles.use(Role.GENERATOR) as other:
            generator = other(*args)
            with roles.use(Role.FAKE) as velocity:
                torch.testing.assert_close(velocity(*args), want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(other(*args), generator, atol=0, rtol=0)
    assert bool((want != generator).any())
    with roles.use(Role.SURROGATE) as velocity:  # a visit without gradient inside a graph leaves the graph right
        loss = velocity(*args).square().mean()
        with torch.no_grad(), roles.use(Role.FAKE) as fake:
            fake(*args)
        loss.backward()
    assert all(torch.equal(p, base[n]) for n, p in backbone.transformer.named_parameters() if n in base)


@pytest.mark.parametrize("added", [None, {Role.FAKE: AddedDelta(Role.SURROGATE, 0.7)}], ids=["alone", "added"])
def test_merged_roles_learn_as_adapters_do(added, random_model: Path):
    """The gradients of an adapter whose weights are merged are those that it has beside the layer."""
    found = []
    for merge in (False, True):
        backbone = load(random_model)
        torch.manual_seed(0)
        roles = lora_roles(backbone, lora(), OWN, merge=merge, added=added)
        disturb(roles, Role.FAKE)
        disturb(roles, Role.SURROGATE)
        with roles.use(Role.FAKE) as velocity:
            loss = velocity(*inputs(backbone)).square().mean()
            with torch.no_grad(), roles.use(Role.GENERATOR) as other:  # the layers hold another role for a while
                other(*inputs(backbone))
            loss.backward()
        found.append({name: p.grad for name, p in roles.weights(Role.FAKE).items()})
        assert all(p.grad is None for role in OWN if role != Role.FAKE for p in roles.parameters(role))
        assert all(layer.learns is None for layer in roles._members[Role.FAKE].host.layers)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)
    assert any(bool(gradient.any()) for gradient in found[0].values())


def test_adapters_on_other_layers_are_refused(random_model: Path):
    config = LoraConfig(r=4, target_modules=["pos_embed.proj"])
    with pytest.raises(
        ValueError, match=r"^model\.lora\.targets: pos_embed\.proj is a Conv2d; name linear layers alone$"
    ):
        lora_roles(load(random_model), config, OWN)


def test_merged_roles_follow_kernels_that_pytorch_does_not_count(monkeypatch, random_model: Path):
    """On a GPU neither an average nor an optimizer need raise the version of what it changes."""

    def lerp(targets, sources, weight):
        for p, q in zip(targets, sources, strict=True):
            p.data.lerp_(q, weight)

    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data.add_(0.05)

    monkeypatch.setattr(torch, "_foreach_lerp_", lerp)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    backbone = load(random_model)
    roles = lora_roles(backbone, lora(), OWN, merge=True)
    args = inputs(backbone)

    def seen(role: Role) -> torch.Tensor:
        with torch.no_grad(), roles.use(role) as velocity:
            return velocity(*args)

    start = seen(Role.GENERATOR), seen(Role.GENERATOR_EMA)
    Optimizer(roles.parameters(Role.GENERATOR), OptimizerConfig(learning_rate=1.0), total=1).step()
    roles.average(Role.GENERATOR_EMA, Role.GENERATOR, 0.5)
    assert not torch.equal(seen(Role.GENERATOR), start[0])
    assert not torch.equal(seen(Role.GENERATOR_EMA), start[1])


ADDED = {role: AddedDelta(Role.SURROGATE, 0.7) for role in (Role.GENERATOR, Role.FAKE)}


@pytest.mark.parametrize("full", [(), (Role.SURROGATE,)], ids=["adapter", "full"])
@pytest.mark.parametrize("merge", [False, True])
def test_a_role_acts_with_what_it_carries(full: tuple[Role, ...], merge: bool, random_model: Path):
    """Against the same weights put together by hand, with and without gradients; nothing flows into what is carried,
    and the role that is carried, the teacher and roles that carry nothing act as they did."""
    backbone = load(random_model)
    roles = lora_roles(backbone, lora(), OWN, full=full, merge=merge, added=ADDED)
    args = inputs(backbone)
    start = {n: p.detach().clone() for n, p in load(random_model).transformer.named_parameters()}
    torch.manual_seed(1)
    with torch.no_grad():
        for role in (Role.GENERATOR, Role.SURROGATE):
            for p in roles.parameters(role):
                p.add_(0.02 * torch.randn_like(p))
        by_hand = load(random_model).transformer
        own = roles.state(Role.GENERATOR)
        phi = roles.state(Role.SURROGATE)
        for name, p in by_hand.named_parameters():
            module = name.removesuffix(".weight")
            if f"{module}.lora_A.weight" in own:
                p += 2.0 * own[f"{module}.lora_B.weight"] @ own[f"{module}.lora_A.weight"]
                other = 2.0 * phi[f"{module}.lora_B.weight"] @ phi[f"{module}.lora_A.weight"] if not full else None
                p += 0.7 * (phi[name] - start[name] if other is None else other)
        expected = backbone.velocity_of(by_hand)(*args)
        others = {}
        for role in (Role.TEACHER, Role.SURROGATE, Role.REFERENCE):
            with roles.use(role) as velocity:
                others[role] = velocity(*args)
        with roles.use(Role.GENERATOR) as velocity:
            torch.testing.assert_close(velocity(*args), expected, atol=2e-5, rtol=0)
        for role, before in others.items():
            with roles.use(role) as velocity:
                torch.testing.assert_close(velocity(*args), before, rtol=0, atol=0)
    with roles.use(Role.GENERATOR) as velocity:
        v = velocity(*args)
        torch.testing.assert_close(v.detach(), expected, atol=2e-5, rtol=0)
        v.square().mean().backward()
    assert all(p.grad is None for p in roles.parameters(Role.SURROGATE))
    assert any(bool(p.grad.any()) for p in roles.parameters(Role.GENERATOR))
    with torch.no_grad():  # what is carried moves on, and the role with it
        for p in roles.parameters(Role.SURROGATE):
            p.mul_(1.5)
        with roles.use(Role.GENERATOR) as velocity:
            assert bool((velocity(*args) - expected).abs().max() > 1e-3)
        for strength, weight in ((0.0, 0.0), (0.5, 0.35)):  # and so it does when that is weakened
            roles.weaken(Role.SURROGATE, strength)
            assert roles.added_weight(Role.FAKE) == pytest.approx(weight)
            assert roles.added_weight(Role.SURROGATE) == 0
            with roles.use(Role.GENERATOR) as velocity:
                weaker = velocity(*args)
            by_hand = load(random_model).transformer
            phi = roles.state(Role.SURROGATE)
            for name, p in by_hand.named_parameters():
                module = name.removesuffix(".weight")
                if f"{module}.lora_A.weight" in own:
                    other = 2.0 * phi[f"{module}.lora_B.weight"] @ phi[f"{module}.lora_A.weight"] if not full else None
                    p += 2.0 * own[f"{module}.lora_B.weight"] @ own[f"{module}.lora_A.weight"]
                    p += weight * (phi[name] - start[name] if other is None else other)
            torch.testing.assert_close(weaker, backbone.velocity_of(by_hand)(*args), atol=2e-5, rtol=0)


@pytest.mark.parametrize("full", [(), (Role.SURROGATE,)], ids=["adapter", "full"])
@pytest.mark.parametrize("merge", [False, True])
def test_what_sits_on_a_second_backbone_is_carried_too(full, merge: bool, random_model: Path, tmp_path: Path):
    """The change of the teacher's weights acts on the student's, as it does in the exported file, in forwards with and
    without gradients and after it has moved on; a role may be on stage between another's forward and backward."""
    student, other = load(random_model), load(random_model)
    with torch.no_grad():
        for p in other.transformer.parameters():
            p.mul_(1.1)
    start = {n: p.detach().clone() for n, p in other.transformer.named_parameters()}
    roles = lora_roles(student, lora(), OWN, teacher=other, full=full, merge=merge, added=ADDED)
    args = inputs(student)
    torch.manual_seed(1)
    for _ in range(2):
        with torch.no_grad():
            for role in (Role.GENERATOR, Role.SURROGATE):
                for p in roles.parameters(role):
                    p.add_(0.02 * torch.randn_like(p))
            by_hand = load(random_model).transformer
            own, phi = roles.state(Role.GENERATOR), roles.state(Role.SURROGATE)
            for name, p in by_hand.named_parameters():
                a, b = (f"{name.removesuffix('.weight')}.lora_{x}.weight" for x in "AB")
                if a in own:
                    p += 2.0 * own[b] @ own[a] + 0.7 * (phi[name] - start[name] if full else 2.0 * phi[b] @ phi[a])
            expected = student.velocity_of(by_hand)(*args)
            with roles.use(Role.GENERATOR) as velocity:
                torch.testing.assert_close(velocity(*args), expected, atol=2e-5, rtol=0)
        with roles.use(Role.GENERATOR) as velocity:
            v = velocity(*args)
            with torch.no_grad(), roles.use(Role.FAKE) as fake_velocity:
                fake_velocity(*args)
            v.square().mean().backward()
        torch.testing.assert_close(v.detach(), expected, atol=2e-5, rtol=0)
        trained = {id(p) for p in roles.parameters(Role.GENERATOR)}
        assert all(p.grad is None for p in student.transformer.parameters() if id(p) not in trained)
        assert all(p.grad is None for p in other.transformer.parameters())
        assert any(bool(p.grad.any()) for p in roles.parameters(Role.GENERATOR))
    if not full:  # of which so low a rank holds no more than the nearest
        student.save_lora(tmp_path, *exported(roles, Role.GENERATOR, lora()))
        plain = load(random_model)
        plain.pipeline.load_lora_weights(tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(plain.velocity_of(plain.transformer)(*args), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("full", "rank"), [((), 4), ((Role.SURROGATE,), 64)], ids=["adapter", "full"])
def test_an_exported_adapter_holds_what_the_role_carries(full, rank: int, random_model: Path, tmp_path: Path):
    """The change of full weights needs the layers' own rank, 128."""
    backbone = load(random_model)
    roles = lora_roles(backbone, lora(rank), OWN, full=full, added=ADDED)
    torch.manual_seed(1)
    with torch.no_grad():
        for role in (Role.GENERATOR, Role.SURROGATE):
            for p in roles.parameters(role):
                p.add_(0.02 * torch.randn_like(p))
    args = inputs(backbone)
    with torch.no_grad(), roles.use(Role.GENERATOR) as velocity:
        whole = velocity(*args)
    roles.weaken(Role.SURROGATE, 0.5)
    with torch.no_grad(), roles.use(Role.GENERATOR) as velocity:
        expected = velocity(*args)
    assert float((expected - whole).abs().max()) > 1e-3
    weights, config = exported(roles, Role.GENERATOR, lora(rank))
    assert (config.r, config.lora_alpha) == (2 * rank, 2 * rank)
    backbone.save_lora(tmp_path, weights, config)
    plain = load(random_model)
    plain.pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(plain.velocity_of(plain.transformer)(*args), expected, atol=2e-5, rtol=0)


def test_changes_below_the_backbones_precision_are_carried(random_model: Path, tmp_path: Path):
    """A change of a thousandth is lost in bfloat16's weights, and has to act, and be in the file, all the same."""
    backbone = load(random_model, dtype=torch.bfloat16)
    roles = lora_roles(backbone, lora(), OWN, added=ADDED)
    x, t, c = inputs(backbone)
    with torch.no_grad():
        for name, p in roles.weights(Role.SURROGATE).items():
            torch.manual_seed(p.numel())
            p.copy_(torch.randn_like(p) * (1e-4 if "lora_B" in name else 0.1))
        largest = max(float(d.abs().max()) for d in roles.deltas(Role.SURROGATE))
        with roles.use(Role.GENERATOR) as velocity:
            acting = roles._members[Role.GENERATOR].host._acting
            v = velocity(x, t, c)
        weights, config = exported(roles, Role.GENERATOR, lora())
    assert largest < 2e-3
    assert acting == (("generator", 1.0), ("surrogate", 0.7))
    one = load(random_model, dtype=torch.bfloat16)
    backbone.save_lora(tmp_path, weights, config)
    alone = lora_roles(one, config, (Role.GENERATOR,))
    load_lora(alone, (Role.GENERATOR,), tmp_path, config)
    for d, e in zip(roles.deltas(Role.SURROGATE), alone.deltas(Role.GENERATOR), strict=True):
        torch.testing.assert_close(0.7 * d, e, atol=1e-7, rtol=1e-4)
    with torch.no_grad(), alone.use(Role.GENERATOR) as velocity:
        torch.testing.assert_close(velocity(x, t, c), v, atol=0.05, rtol=0.05)  # bfloat16's own noise


def test_carrying_needs_an_adapter(random_model: Path):
    with pytest.raises(ValueError, match="role generator has full weights"):
        specs(full=(Role.GENERATOR,), added=ADDED)


def test_a_lora_of_fewer_modules_leaves_the_others_at_nothing(random_model: Path, tmp_path: Path):
    backbone = load(random_model)
    few = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_q", "to_out.0"])
    small = lora_roles(backbone, few, (Role.GENERATOR,))
    disturb(small, Role.GENERATOR)
    args = inputs(backbone)
    with torch.no_grad(), small.use(Role.GENERATOR) as velocity:
        expected = velocity(*args)
    backbone.save_lora(tmp_path, *exported(small, Role.GENERATOR, few))
    other = load(random_model)
    roles = lora_roles(other, lora(), (Role.GENERATOR,))
    disturb(roles, Role.GENERATOR)  # of what was loaded before, nothing may stay
    load_lora(roles, (Role.GENERATOR,), tmp_path, lora())
    with torch.no_grad(), roles.use(Role.GENERATOR) as velocity:
        torch.testing.assert_close(velocity(*args), expected, atol=2e-5, rtol=0)
