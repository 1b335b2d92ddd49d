"""The probes on frozen features in model.py."""
import numpy as np
import pytest
import torch

from common import BadInput
from model import (Config, Model, class_scores, dense_probe, dense_tokens, knn, linear_probe, logistic, patch_labels, patchify,
                   probe_scores, scores_of, token_grid, whole_patches)


pytestmark = pytest.mark.usefixtures("one_thread")


def clusters(n, K, F, apart, seed=0):
    """n points of K Gaussian clusters whose centres lie `apart` standard deviations from the origin, along axes of their own."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % K
    return torch.randn(n, F, generator=g) + apart * torch.eye(F)[:K][y], y


def test_patch_labels_by_hand():
    labels = torch.zeros(4, 4, 2, dtype=torch.uint8)                                   # 2 x 2 x 1 patches of 8 voxels
    labels[:2, :2] = 3                                                                 # all of it
    labels[:2, 2:, 0] = 2                                                              # 4 of 2, 2 of 1
    labels[0, 2:, 1] = 1
    labels[2, 0, 0] = 1                                                                # one voxel
    label, touched = patch_labels(labels, 2, cover=0.25)
    assert label.tolist() == [3, 2, 0, 0] and touched.tolist() == [True, True, True, False]
    assert patch_labels(labels, 2, cover=0.125)[0].tolist() == [3, 2, 1, 0]
    assert patch_labels(labels, 2, cover=0.75)[0].tolist() == [3, 0, 0, 0]
    labels[0, 2, 0] = labels[1, 2, 0] = 1                                              # 2 of 2 and 4 of 1
    assert patch_labels(labels, 2, cover=0.25)[0][1] == 1
    labels[0, 2, 1] = 2                                                                # 3 of each: the lower number
    assert patch_labels(labels, 2, cover=0.25)[0][1] == 1
    empty, touched = patch_labels(torch.zeros(4, 4, 4, dtype=torch.uint8), 2)
    assert not empty.any() and not touched.any()


def test_whole_patches_are_the_middle():
    v = torch.arange(11 * 8 * 9).view(11, 8, 9)
    assert torch.equal(whole_patches(v, 4), v[1:9, :, :8])
    with pytest.raises(BadInput, match="multiple of the patch 16"):
        whole_patches(v, 16)


@pytest.mark.parametrize("roi", [(8, 8, 8), (100, 100, 100), (12, 4, 8)])
def test_token_grid_puts_each_patch_in_its_place(roi):
    v = torch.rand(20, 12, 8)
    grid = token_grid(lambda x: patchify(x, 4), v, 4, roi, batch=3)
    assert grid.shape == (5, 3, 2, 64)
    assert torch.equal(grid.flatten(0, 2), patchify(v[None], 4)[0])


def test_dense_tokens_thin_the_background_and_keep_pairs_together():
    volume, labels = torch.rand(16, 8, 8), torch.zeros(16, 8, 8, dtype=torch.uint8)
    labels[:4, :4, :4] = 1
    labels[4:8, :4, :4] = 2
    labels[8, 0, 0] = 2                                                                # touches a patch, too little to name it
    x, y, who = dense_tokens(lambda v: patchify(v, 4), [(volume, labels)] * 2, 4, (8, 8, 8))
    assert y.tolist() == [1, 2, 0, 0, 0, 0] * 2 and who.tolist() == [0] * 6 + [1] * 6  # 3 touched patches, 3 of the other 13
    assert torch.equal(x[0], volume[:4, :4, :4].reshape(-1)) and torch.equal(x[1], volume[4:8, :4, :4].reshape(-1))


def test_knn_is_brute_force():
    (x, y), (q, _) = clusters(70, 5, 8, 1.0), clusters(40, 5, 8, 1.0, seed=1)
    shares = knn(x, y, 5, q, k=7, temperature=0.1).double().numpy()
    a, b = (t.double().numpy() / np.linalg.norm(t.double().numpy(), axis=1, keepdims=True) for t in (x, q))
    for i in range(len(b)):
        cosine = a @ b[i]
        near = np.argsort(-cosine)[:7]
        vote = np.array([np.exp(cosine[near][y.numpy()[near] == c] / 0.1).sum() for c in range(5)])
        np.testing.assert_allclose(shares[i], vote / vote.sum(), atol=1e-4)
    assert knn(x[:3], y[:3], 5, q).shape == (40, 5)                                    # fewer than k: all of them


def test_logistic_is_at_the_minimum():
    x, y = clusters(90, 3, 5, 1.0)
    w = logistic(x, y, 3, l2=0.1)
    from scipy.optimize import minimize
    X, Y = x.double().numpy(), np.eye(3)[y]

    def loss(v):
        v = v.reshape(3, 6)
        z = X @ v[:, :-1].T + v[:, -1]
        return float((np.log(np.exp(z).sum(1)) - (z * Y).sum(1)).mean() + 0.05 * (v[:, :-1] ** 2).sum())
    least = minimize(loss, np.zeros(18)).fun
    assert loss(w.double().numpy().reshape(-1)) < least + 1e-4
    assert w.requires_grad is False


def test_linear_probe_finds_what_is_there_and_nothing_else():
    (x, y), (q, truth) = clusters(400, 4, 16, 4.0), clusters(200, 4, 16, 4.0, seed=1)
    held = torch.arange(400) % 5 == 0
    probs, _ = linear_probe(x, y, 4, q, held)
    assert (probs.argmax(1) == truth).float().mean() > 0.95
    torch.testing.assert_close(probs.sum(1), torch.ones(200))
    noise, l2 = linear_probe(torch.randn(400, 16, generator=torch.Generator().manual_seed(5)), y, 4, q, held)
    assert (noise.argmax(1) == truth).float().mean() < 0.45 and l2 >= 0.1                # nothing to learn: strong regularisation
    assert torch.equal(probs, linear_probe(x, y, 4, q, held)[0])


def test_linear_probe_takes_the_l2_that_the_held_out_rows_prefer():
    x, y = clusters(120, 3, 40, 1.0)
    held = torch.arange(120) < 40
    strengths = (1.0, 0.1, 0.01, 0.0001)
    losses = [torch.nn.functional.cross_entropy(scores_of(logistic(x[~held], y[~held], 3, l2), x[held]), y[held]).item() for l2 in strengths]
    assert linear_probe(x, y, 3, x, held, strengths)[1] == strengths[int(np.argmin(losses))]
    assert min(losses) < losses[-1] - 0.05                                             # it matters here


def test_class_scores_by_hand():
    truth = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    probs = torch.eye(4)[[0, 0, 0, 1, 1, 2, 3]]
    s = class_scores(truth, probs)
    assert s["accuracy"] == pytest.approx(5 / 7)
    assert s["recall_each"] == pytest.approx([0.75, 0.5, None, 1.0]) and s["count_each"] == [4, 2, 0, 1]
    assert s["balanced_accuracy"] == pytest.approx((0.75 + 0.5 + 1) / 3)
    assert s["f1_each"] == pytest.approx([6 / 7, 0.5, None, 1.0]) and s["f1"] == pytest.approx((6 / 7 + 0.5 + 1) / 3)
    pairs = lambda p, n: np.mean([(a > b) + 0.5 * (a == b) for a in p for b in n])  # noqa: E731
    each = [pairs(probs[truth == c, c].numpy(), probs[truth != c, c].numpy()) for c in (0, 1, 3)]
    assert each[0] == 0.875 and s["auc"] == pytest.approx(np.mean(each))


def test_probe_scores_are_blind_to_scale_and_to_constants():
    (x, y), (q, truth) = clusters(300, 3, 8, 3.0), clusters(120, 3, 8, 3.0, seed=1)
    held = torch.arange(300) % 4 == 0
    plain = probe_scores(x, y, held, q, truth, 3)
    scale = torch.tensor([1e-3, 1, 10, 1, 1, 1, 100, 1])
    other, query = (torch.cat([a * scale + 5, torch.full((len(a), 1), c)], 1) for a, c in ((x, 7.0), (q, 9.0)))
    odd = probe_scores(other, y, held, query, truth, 3)
    assert plain["knn"]["accuracy"] > 0.85 and plain["linear"]["accuracy"] > 0.85
    for p in ("knn", "linear"):
        assert odd[p]["accuracy"] == pytest.approx(plain[p]["accuracy"], abs=0.02)


def scans(n, seed):
    """Labelled scans [24, 16, 16] in which organ 1 is bright and organ 2 is striped; where they lie is random."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(n):
        label = rng.integers(0, 3, (6, 4, 4)).repeat(4, 0).repeat(4, 1).repeat(4, 2).astype(np.uint8)
        v = 0.4 + 0.02 * rng.standard_normal(label.shape) + 0.4 * (label == 1) + 0.2 * (label == 2) * (-1.0) ** np.arange(16)
        out.append((torch.from_numpy(v).half(), torch.from_numpy(label)))
    return out


def test_dense_probe_leaves_the_random_states_alone_and_repeats():
    model = Model(Config(width=24, layers=2, heads=2, patch=4))
    encode = lambda x: model.encode(x)[0]  # noqa: E731
    before = torch.get_rng_state(), np.random.get_state()
    train, val = scans(4, 0), scans(2, 1)
    first = dense_probe(encode, train, val, 3, 4, (16, 16, 16))
    assert torch.equal(before[0], torch.get_rng_state())
    after = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after))
    assert first == dense_probe(encode, train, val, 3, 4, (16, 16, 16))
    assert all(w.grad is None for w in model.parameters()) and torch.is_grad_enabled()


def test_dense_probe_tells_features_from_noise():
    train, val = scans(4, 0), scans(2, 1)
    told = dense_probe(lambda x: torch.stack([patchify(x, 4).mean(-1), patchify(x, 4).std(-1)], -1), train, val, 3, 4, (16, 16, 16))
    g = torch.Generator().manual_seed(0)
    blind = dense_probe(lambda x: torch.randn(len(x), patchify(x, 4).shape[1], 8, generator=g), train, val, 3, 4, (16, 16, 16))
    assert told["knn"]["balanced_accuracy"] > 0.95 and told["linear"]["balanced_accuracy"] > 0.8
    assert blind["knn"]["balanced_accuracy"] < 0.5 and blind["linear"]["balanced_accuracy"] < 0.5
    assert told["tokens"] == blind["tokens"]


def test_dense_probe_says_what_it_lacks():
    few = scans(2, 0)
    encode = lambda x: patchify(x, 4)  # noqa: E731
    with pytest.raises(BadInput, match="1 labelled cases to fit"):
        dense_probe(encode, few[:1], few, 3, 4, (16, 16, 16))
    bare = [(v, torch.zeros_like(l)) for v, l in few]
    with pytest.raises(BadInput, match="no token of the cases to fit"):
        dense_probe(encode, bare, few, 3, 4, (16, 16, 16))
    with pytest.raises(BadInput, match="no token of the cases to score"):
        dense_probe(encode, few, bare, 3, 4, (16, 16, 16))
