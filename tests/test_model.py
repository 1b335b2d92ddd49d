import os
from pathlib import Path

import numpy as np
import pytest
import torch

from common import BadInput, save_checkpoint
from kernels.plain import attend
from model import (
    FORMAT,
    SIZES,
    Config,
    Model,
    checkpoint_state,
    layer_decay_groups,
    load_pretrained,
    new_encoder,
    patchify,
    positions,
    standardise,
    to_unit,
    token_order,
    unpatchify,
    untrained,
)

TINY = {"width": 48, "layers": 2, "heads": 2, "patch": 4}


@pytest.fixture(scope="module")
def golden():
    """Weights and answers of the published implementation, float32."""
    with np.load(Path(__file__).parent / "golden/reference_tiny.npz", allow_pickle=False) as z:
        return {k: z[k] for k in z.files}


@pytest.fixture
def published(golden, tmp_path):
    """The golden weights as the file that the authors distribute."""
    sd = {k[3:]: torch.from_numpy(v) for k, v in golden.items() if k.startswith("sd.")}
    torch.save({"state_dict": sd}, tmp_path / "published.pt")
    return tmp_path / "published.pt"


@pytest.fixture(params=["torch", "triton"])
def reference(golden, published, request):
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is not on: a GPU has its own tests")
    return load_pretrained(published, heads=int(golden["config"][2])).use(request.param)


def close(ours, theirs, tolerance=1e-4):
    ours, theirs = (torch.as_tensor(x).detach().double() for x in (ours, theirs))
    return ours.shape == theirs.shape and (ours - theirs).norm() <= tolerance * theirs.norm()


# ---- the published implementation's answers


def test_golden_loss_predictions_and_every_gradient(golden, reference):
    loss, pred = reference(
        torch.from_numpy(golden["pretrain.image"]), torch.from_numpy(golden["pretrain.prefix"])
    )
    loss.backward()
    assert close(loss, golden["pretrain.loss"]) and close(pred, golden["pretrain.pred"])
    ours = {
        "model.embed_tokens.weight": reference.begin,
        "model.patchifier.proj.weight": reference.embed.weight,
        "model.patchifier.proj.bias": reference.embed.bias,
        "model.norm.weight": reference.norm.weight,
        "model.norm.bias": reference.norm.bias,
        "decoder_pred.weight": reference.head.weight,
        "decoder_pred.bias": reference.head.bias,
    }
    ours = {k: w.grad for k, w in ours.items()}
    for i, b in enumerate(reference.blocks):
        at = f"model.layers.{i}."
        for x, g in zip("qkv", b.qkv.weight.grad.chunk(3)):
            ours[f"{at}self_attn.{x}_proj.weight"] = g
        for name, layer in (
            ("self_attn.o_proj", b.proj),
            ("mlp.linear1", b.fc1),
            ("mlp.linear2", b.fc2),
            ("input_layernorm", b.norm1),
            ("post_attention_layernorm", b.norm2),
        ):
            ours[f"{at}{name}.weight"], ours[f"{at}{name}.bias"] = (
                layer.weight.grad,
                layer.bias.grad,
            )
    theirs = dict(zip(golden["pretrain.grad_norm_keys"].tolist(), golden["pretrain.grad_norms"]))
    assert ours.keys() == theirs.keys()
    for k, norm in theirs.items():
        assert ours[k].norm().item() == pytest.approx(norm, rel=1e-4), k


def test_golden_encoder(golden, reference):
    last, hidden = reference.encode(torch.from_numpy(golden["encoder.image"])[:, 0])
    assert close(last, golden["encoder.last"]) and close(
        torch.stack(hidden), golden["encoder.hidden"]
    )
    assert hidden[-1] is last and len(hidden) == len(reference.blocks)


# ---- weights


def test_every_published_key_is_accounted_for(published, tmp_path):
    whole = torch.load(published, weights_only=True)["state_dict"]
    assert load_pretrained(published).config.heads == 1  # 48 / 64, at least 1

    def refused(change, words):
        sd = dict(whole)
        change(sd)
        torch.save({"state_dict": sd}, tmp_path / "bad.pt")
        with pytest.raises(BadInput, match=words):
            load_pretrained(tmp_path / "bad.pt", heads=2)

    for key in whole:
        words = "embed_tokens" if "embed_tokens" in key else f"lack {key}|fit|neither"
        refused(lambda sd, key=key: sd.pop(key), words)
    refused(lambda sd: sd.update(extra=torch.ones(1)), "nothing here uses: extra")
    refused(
        lambda sd: sd.update({"model.norm.bias": torch.ones(7)}),
        r"norm.bias \(7,\) \(needed \(48,\)\)",
    )
    row = {"model.embed_tokens.weight": torch.ones(1, 48)}
    refused(lambda sd: sd.update(row), "not as the published weights: index 1")


def test_our_checkpoint_round_trip_and_refusals(tmp_path):
    model = Model(Config(**TINY, order="image"))
    save_checkpoint(tmp_path / "a.pt", **checkpoint_state(model), step=3)
    back = load_pretrained(tmp_path / "a.pt")
    assert back.config == model.config and all(
        torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters())
    )
    with pytest.raises(BadInput, match="2 heads, not 3"):
        load_pretrained(tmp_path / "a.pt", heads=3)
    state = checkpoint_state(model)
    state["model"] = {k: v for k, v in state["model"].items() if k != "norm.bias"}
    save_checkpoint(tmp_path / "b.pt", **state)
    with pytest.raises(BadInput, match="norm.bias missing"):
        load_pretrained(tmp_path / "b.pt")
    torch.save({"weights": torch.ones(2)}, tmp_path / "c.pt")
    with pytest.raises(BadInput, match=f"{FORMAT}.*published"):
        load_pretrained(tmp_path / "c.pt")


# ---- patches and positions


def test_patchify_round_trip_and_order():
    v = torch.arange(8 * 12 * 4, dtype=torch.float32).view(1, 8, 12, 4)
    p = patchify(v, 4)
    assert p.shape == (1, 6, 64) and torch.equal(unpatchify(p, (2, 3, 1)), v)
    assert torch.equal(
        p[0, 1].view(4, 4, 4), v[0, 0:4, 4:8, 0:4]
    )  # the second patch is one further along y: z has but one
    with pytest.raises(BadInput, match="8x12x6 is not a multiple of the patch 4"):
        patchify(torch.zeros(1, 8, 12, 6), 4)


def test_token_order_is_a_permutation_and_image_order_ends_one_sub_image_first():
    order = token_order((2, 3, 8), 4, "image")
    assert sorted(order.tolist()) == list(range(48)) and token_order((2, 3, 8), 4, "raster") is None
    sub_image = order % 8 // 2
    assert torch.equal(sub_image, torch.arange(4).repeat_interleave(12))
    with pytest.raises(BadInput, match="6 patches along z do not divide into 4"):
        token_order((2, 2, 6), 4, "image")


def test_positions_follow_the_formula():
    table, C = positions((3, 4, 5), 48), 48
    for g, at in ((0, (0, 0, 0)), (27, (1, 1, 2)), (59, (2, 3, 4))):
        want = []
        for p in at:
            angles = [p * 10000 ** (-i / (C / 6)) for i in range(C // 6)]
            want += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
        assert np.allclose(table[g], want, atol=1e-6)
    assert (
        positions((2, 2, 2), 1024).shape == (8, 1024)
        and positions((2, 2, 2), 1024)[:, 1020:].abs().sum() == 0
    )


def test_to_unit_maps_each_sub_image_by_its_own_range():
    v = torch.randint(-1000, 1000, (2, 4, 4, 8), dtype=torch.int16)
    ranges = torch.tensor([[[-500.0, 500.0], [0.0, 100.0]], [[-1000.0, 1000.0], [7.0, 7.0]]])
    got = to_unit(v, ranges)
    for b in range(2):
        for s in range(2):
            low, high = ranges[b, s]
            want = ((v[b, :, :, 4 * s : 4 * s + 4].float() - low) / max(high - low, 1e-6)).clamp(
                0, 1
            )
            assert torch.allclose(got[b, :, :, 4 * s : 4 * s + 4], want, atol=1e-6)


def test_standardise_uses_the_unbiased_variance():
    p = torch.rand(2, 3, 64)
    t, mean, scale = standardise(p)
    assert torch.allclose(
        scale[..., 0], torch.from_numpy((p.numpy().var(-1, ddof=1) + 1e-6) ** 0.5), atol=1e-6
    )
    assert torch.allclose(t * scale + mean, p, atol=1e-5)
    assert standardise(torch.full((1, 1, 64), 0.3))[0].abs().max() < 1e-3


# ---- attention


def brute_force(qkv, prefix):
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    out = torch.zeros_like(q)
    for b, p in enumerate(prefix):
        for i in range(q.shape[2]):
            n = max(i + 1, p)
            w = (q[b, :, i, None] * k[b, :, :n]).sum(-1) * q.shape[-1] ** -0.5
            out[b, :, i] = (w.softmax(-1)[..., None] * v[b, :, :n]).sum(1)
    return out.transpose(1, 2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_prefix_attention_against_loops(dtype, tolerance):
    torch.manual_seed(0)
    qkv, prefix = torch.randn(4, 21, 3, 2, 8).to(dtype), [0, 1, 20, 21]
    assert close(attend(qkv, torch.tensor(prefix)), brute_force(qkv, prefix), tolerance)
    assert close(attend(qkv), brute_force(qkv, [21] * 4), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["raster", "image"])
def test_nothing_leaks_from_the_future(order, dtype):
    """Patch t at or after the prefix changes no prediction of patches 0 … t."""
    torch.manual_seed(1)
    model = Model(Config(**TINY, images=2, order=order)).to(dtype)
    volume, prefix = torch.rand(3, 8, 8, 16, dtype=dtype), torch.tensor([0, 5, 13])
    G, grid = 16, (2, 2, 4)
    place = token_order(grid, 2, order)
    place = torch.arange(G) if place is None else place
    with torch.no_grad():
        _, before = model(volume, prefix)
        for t in range(G):
            patches = patchify(volume, 4)
            patches[:, place[t]] = torch.rand(3, 64, dtype=dtype)
            _, after = model(unpatchify(patches, grid), prefix)
            for b, p in enumerate(prefix.tolist()):
                if t >= p:
                    assert torch.equal(before[b, : t + 1], after[b, : t + 1])
                elif t < G - 1:
                    assert not torch.equal(before[b, p], after[b, p])  # the prefix is seen by all
                if t < G - 1:
                    assert not torch.equal(before[b, t + 1 :], after[b, t + 1 :])


@pytest.mark.parametrize("order", ["raster", "image"])
def test_a_step_compiles_as_one_graph(order):
    torch.manual_seed(0)
    model, volume, prefix = (
        Model(Config(**TINY, images=2, order=order)),
        torch.rand(2, 8, 8, 16),
        torch.tensor([0, 5]),
    )
    want, _ = model(volume, prefix)
    want.backward()
    gradient, model.embed.weight.grad = model.embed.weight.grad, None
    got, _ = torch.compile(model, backend="aot_eager", fullgraph=True)(volume, prefix)
    got.backward()
    assert torch.allclose(want, got) and torch.allclose(
        gradient, model.embed.weight.grad, atol=1e-6
    )


def test_prefix_zero_is_causal_and_the_loss_counts_targets_alone():
    torch.manual_seed(2)
    model, volume = Model(Config(**TINY)), torch.rand(2, 8, 8, 8)
    prefix = torch.tensor([0, 6])
    loss, pred = model(volume, prefix)
    errors, _ = model(volume, prefix, per_patch=True)
    target = standardise(patchify(volume, 4))[0]
    want = (pred - target).square().mean(-1)
    assert loss.requires_grad and not pred.requires_grad
    assert (
        pred.shape == (2, 8, 64)
        and torch.allclose(errors[0], want[0])
        and errors[1, :6].abs().sum() == 0
    )
    assert torch.allclose(loss, (want[0].sum() + want[1, 6:].sum()) / 10)


def test_it_computes_one_token_a_patch():
    model, seen = Model(Config(**TINY)), []
    model.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    model(torch.rand(1, 8, 8, 8), torch.tensor([3]))
    model.encode(torch.rand(1, 8, 8, 8))
    assert seen == [8, 9]


def test_flops_agree_with_torch_counter():
    from torch.utils.flop_counter import FlopCounterMode

    model = Model(
        Config(width=96, layers=3, heads=3, patch=8)
    ).bfloat16()  # whose attention is counted on a CPU too
    with FlopCounterMode(display=False) as counter:
        loss, _ = model(
            torch.rand(1, 32, 32, 32).bfloat16(), torch.tensor([63])
        )  # all visible: no product is masked
        loss.backward()
    assert model.flops([32] * 3, prefix=63) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_one_batch_is_overfitted():
    torch.manual_seed(3)
    model, volume, prefix = Model(Config(**TINY)), torch.rand(2, 8, 8, 8), torch.tensor([2, 4])
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        loss, _ = model(volume, prefix)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss < 0.05


def test_recomputed_blocks_give_the_same_gradients():
    model, volume = Model(Config(width=24, layers=3, heads=2, patch=4)), torch.rand(2, 8, 8, 8)
    grads = []
    for model.recompute in (False, True):
        loss, _ = model(volume, torch.tensor([1, 5]))
        grads.append((loss, *torch.autograd.grad(loss, [*model.parameters()])))
    assert all(map(torch.equal, *grads))


def test_sizes_are_those_of_vit():
    with torch.device("meta"):
        count = {
            k: sum(w.numel() for w in Model(Config(**v)).parameters()) for k, v in SIZES.items()
        }
    blocks = {k: v["layers"] * 12 * v["width"] ** 2 for k, v in SIZES.items()}
    assert blocks["base"] == 84_934_656 and all(
        blocks[k] < count[k] < blocks[k] * 1.55 for k in SIZES
    )


def test_bad_configurations():
    for change, words in (
        ({"heads": 5}, "multiple of heads 5"),
        ({"order": "spiral"}, "'spiral'"),
    ):
        with pytest.raises(BadInput, match=words):
            Config(**{**TINY, **change})


def test_initialisation_is_the_published_one_from_vit_b_on():
    torch.manual_seed(0)
    model = Model(Config(width=768, layers=1, heads=12, patch=8))
    for layer in (model.embed, model.head, model.blocks[0].qkv, model.blocks[0].fc1):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.bias is None or not layer.bias.any()
    nano = Model(Config(**SIZES["nano"]))
    bright, flat = torch.ones(512), torch.randn(512)
    assert (nano.embed.weight @ bright).norm() < 0.1 * (nano.embed.weight @ flat).norm() * 512**0.5


def test_cached_keys_and_values_give_the_causal_answer():
    torch.manual_seed(4)
    model, x, prefix = Model(Config(**TINY)), torch.randn(2, 9, 48), torch.tensor([4, 4])
    for block in model.blocks:
        past = []
        cached = [block(x[:, :4], past=past)]
        cached += [block(x[:, i : i + 1], past=past) for i in range(4, 9)]
        assert torch.allclose(torch.cat(cached, 1), block(x, prefix), atol=1e-5)


def test_layer_decay_reaches_every_weight_once():
    net = torch.nn.Module()
    net.encoder, net.decoder = Model(Config(**TINY)), torch.nn.Linear(3, 3)
    net.encoder.head.requires_grad_(False)
    groups = layer_decay_groups(net, 0.05, 0.5)
    assert [g["scale"] for g in groups] == [0.125, 0.25, 0.5, 1.0]
    grouped = [w for g in groups for w in g["params"]]
    assert (
        len(grouped) == len({*map(id, grouped)}) == sum(w.requires_grad for w in net.parameters())
    )
    assert {*map(id, groups[0]["params"])} == {
        id(w) for w in (net.encoder.begin, net.encoder.embed.weight, net.encoder.embed.bias)
    }


def test_an_encoder_from_scratch_or_from_a_file(published):
    class Quiet:
        say = staticmethod(lambda *words: None)

    assert new_encoder("scratch", "nano", Quiet).config.width == 192
    assert new_encoder("scratch:small", "nano", Quiet).config.width == 384
    assert new_encoder(str(published), "nano", Quiet).config.width == 48
    assert untrained("scratch:small") and not untrained("scratch/pretrain/ckpt.pt")
    with pytest.raises(BadInput, match="scratch:SIZE"):
        new_encoder("scratch:tiny", "nano", Quiet)
