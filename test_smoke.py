"""Identities, known values, bad input, and the three scripts themselves: pytest -q test_smoke.py

Scripts run inside this process (runpy) where only their outcome matters, and as programs of their
own where signals, exit codes or an empty folder do. Tests on real UCR files look for them in
UCR_DATA, else ../shared/data, and skip where they are absent.
"""

import http.server
import io
import json
import math
import os
import pickle
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import maskgit
import sample
import ssl_losses
import train_stage1
import train_stage2
import vqvae

HERE = Path(__file__).parent
UCR = Path(os.environ.get("UCR_DATA", HERE.parent / "shared" / "data"))
README = (HERE / "README.md").read_text()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def script(name, *flags):
    """Run a script in this process under these flags; return its globals; put all hooks back.

    An error that the script's own hook turns into a line ends as it would outside: SystemExit(1).
    """
    hook, argv = sys.excepthook, sys.argv
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    sys.argv = [f"{name}.py", *map(str, flags)]
    try:
        return runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    except (ValueError, OSError):
        if sys.excepthook is hook:
            raise
        sys.excepthook(*sys.exc_info())  # the script's own: one line on stderr
        sys.exit(1)
    finally:
        sys.excepthook, sys.argv = hook, argv
        for number, handler in handlers:
            signal.signal(number, handler)


def program(name, *flags, cwd=HERE, preexec_fn=None):
    """Start a script as a program."""
    command = [sys.executable, str(HERE / f"{name}.py"), *map(str, flags)]
    return subprocess.Popen(command, cwd=cwd, preexec_fn=preexec_fn, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def refused(capsys, message, name, *flags):
    """Assert that the script ends with this message on stderr."""
    with pytest.raises(SystemExit):
        script(name, *flags)
    assert re.search(message, capsys.readouterr().err)


def ucr(name, ending="tsv"):
    if not (UCR / name / f"{name}_TRAIN.{ending}").exists():
        pytest.skip(f"real file {name}_TRAIN.{ending} is not in {UCR}")
    return UCR


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """An .npz of 40 + 24 short series in three classes."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(64) % 3
    t = torch.linspace(0, 6, 32)
    x = torch.sin(t * (y[:, None] + 1)) + 0.1 * torch.randn(64, 32, generator=generator)
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    return path


TINY1 = ("--epochs", 2, "--batch-size", 16, "--proj-dim", 64, "--device", "cpu")
TINY2 = ("--epochs", 2, "--batch-size", 16, "--device", "cpu")


def train(dataset, run, flags1=(), flags2=()):
    """Both stages with tiny settings but for these flags."""
    script("train_stage1", "--dataset", dataset, "--run", run, *TINY1, *flags1)
    script("train_stage2", "--run", run, *TINY2, *flags2)
    return run


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """A run folder with both stages trained on `small`."""
    return train(small, tmp_path_factory.mktemp("finished") / "run")


def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def weights(path):
    """All tensors of a checkpoint, in order."""
    state = torch.load(path, weights_only=True)
    return [v for part in ("model", "prior") for v in state.get(part, {}).values()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(v, w) for v, w in zip(a, b))


# ---- vqvae.py -----------------------------------------------------------------------------------


def test_stft_round_trip():
    for L in range(8, 301):
        x = torch.randn(2, 3, L)
        u = vqvae.stft(x)
        assert u.shape == (2, 6, 5, L // 2 + 1)
        assert torch.allclose(vqvae.istft(u, L), x, atol=1e-5), L


@pytest.mark.parametrize("L", [8, 24, 96, 128, 140, 500, 1024])
def test_shapes(L):
    model = vqvae.VQVAE(L, C=2, K=8)
    x = torch.randn(3, 2, L)
    z = model.encode(x)
    x_hat, u_hat, log_deviation = model.decode(z)
    H, W = model.grid
    assert z.shape == (3, 64, H, W) and H == 5 and 5 <= W <= 11
    assert (W - 1) * model.stride - 1 < L  # every column begins inside the series
    assert x_hat.shape == log_deviation.shape == x.shape and u_hat.shape == model.stft(x).shape
    model.eval()
    assert model.detokenise(model.tokenise(x)).shape == x.shape


def test_gradients_through_the_quantiser():
    """z_q passes its own on to z unchanged; the commitment loss pulls z to the nearest code."""
    quantiser = vqvae.VectorQuantiser(K=4, D=3)
    quantiser(torch.randn(2, 3, 5, 2))  # places the codes
    codes, z = quantiser.codes.clone(), torch.randn(2, 3, 5, 2, requires_grad=True)
    z_q, s, commitment = quantiser(z)
    w, nearest = torch.randn_like(z), codes[s].transpose(1, 2).reshape(z.shape)
    assert s.shape == (2, 10) and torch.allclose(z_q, nearest, atol=1e-6)
    assert torch.equal(torch.autograd.grad((z_q * w).sum(), z)[0], w)
    gradient = torch.autograd.grad(commitment, z)[0]
    assert torch.allclose(gradient, 2 * (z - nearest) / z.numel(), atol=1e-6)


def test_one_moving_average_step_by_hand():
    quantiser = vqvae.VectorQuantiser(K=2, D=1, decay=0.9)
    quantiser.counts[:] = torch.tensor([10.0, 10.0])
    quantiser.sums[:] = quantiser.codes[:] = torch.tensor([[0.0], [10.0]])
    quantiser.codes[1] = 1.0
    _, s, commitment = quantiser(torch.tensor([0.2, 0.4, 0.9, 1.3]).view(1, 1, 2, 2))
    assert s.tolist() == [[0, 0, 1, 1]]
    assert commitment.item() == pytest.approx((0.04 + 0.16 + 0.01 + 0.09) / 4)
    assert torch.allclose(quantiser.counts, torch.tensor([9.2, 9.2]))
    assert torch.allclose(quantiser.sums, torch.tensor([[0.06], [9.22]]))
    assert torch.allclose(quantiser.codes, torch.tensor([[0.06 / 9.2], [9.22 / 9.2]]))


def test_revival_leaves_used_codes_and_lasts():
    quantiser = vqvae.VectorQuantiser(K=3, D=2)
    quantiser.counts[:] = torch.tensor([30.0, 0.0, 20.0])
    quantiser.codes[:] = torch.tensor([[0.0, 0.0], [99.0, 99.0], [1.0, 1.0]])
    quantiser.sums[:] = quantiser.codes * quantiser.counts[:, None]
    latents = torch.randn(60, 2)
    quantiser.revive(latents)
    assert torch.equal(quantiser.codes[[0, 2]], torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    revived = quantiser.codes[1].clone()
    assert (latents == revived).all(1).any() and quantiser.counts[1] == 20
    quantiser.update(latents, torch.zeros(60, dtype=torch.long))  # nothing chooses code 1
    quantiser.revive(latents)
    assert torch.allclose(quantiser.codes[1], revived)
    assert torch.allclose(quantiser.sums, quantiser.codes * quantiser.counts[:, None], atol=1e-4)


def test_first_batch_places_every_code_on_a_latent():
    quantiser = vqvae.VectorQuantiser(K=16, D=2)
    z = torch.randn(4, 2, 5, 3)
    quantiser.revive(z.transpose(0, 1).flatten(1).T)
    assert (torch.cdist(quantiser.codes, z.transpose(0, 1).flatten(1).T).amin(1) < 1e-3).all()
    assert (quantiser.counts == 60 / 16).all()


def test_eval_changes_no_buffer():
    model = vqvae.VQVAE(32, K=8)
    model.quantiser(model.encode(torch.randn(4, 1, 32)))
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    z_q, _, _ = model.quantiser(model.encode(10 * torch.randn(4, 1, 32)))
    model.decode(z_q)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_distances_stay_fp32_under_autocast():
    quantiser = vqvae.VectorQuantiser(K=8, D=16)
    quantiser(torch.randn(4, 16, 5, 4))
    z = torch.randn(4, 16, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantiser.distances(z), quantiser.eval().distances(z))


def test_noise_of_the_decoder():
    model = vqvae.VQVAE(32, C=2, K=8)
    model.quantiser(model.encode(torch.randn(4, 2, 32)))
    s = model.eval().tokenise(torch.randn(1, 2, 32)).expand(4000, -1)
    x_hat, _, log_deviation = model.decode(model.quantiser.lookup(s[:1], model.grid))
    assert torch.allclose(model.detokenise(s[:1]), x_hat)
    drawn = model.detokenise(s, noise=2.0)
    assert torch.allclose(drawn.mean(0), x_hat[0], atol=0.2)
    assert torch.allclose(drawn.std(0) / 2, log_deviation[0].exp(), rtol=0.06)


def test_perplexity():
    assert vqvae.perplexity(torch.tensor([5.0, 5, 5, 5, 0])).item() == pytest.approx(4)


# ---- ssl_losses.py ------------------------------------------------------------------------------


def loop_barlow(Z1, Z2):
    B, n = Z1.shape
    columns = [[(Z[:, i] - Z[:, i].mean()) / ((Z[:, i] - Z[:, i].mean()) ** 2).mean().sqrt()
                for i in range(n)] for Z in (Z1, Z2)]
    loss = 0
    for i in range(n):
        for j in range(n):
            c = sum(columns[0][i][b] * columns[1][j][b] for b in range(B)) / B
            loss = loss + ((1 - c) ** 2 if i == j else 0.005 * c**2)
    return loss / n


def loop_variance(Z):
    deviations = [(((z - z.mean()) ** 2).sum() / (len(z) - 1) + 1e-4).sqrt() for z in Z.T]
    return sum(torch.relu(1 - d) for d in deviations) / len(deviations)


def loop_off_diagonal(Z, scale):
    total = 0
    for i in range(Z.shape[1]):
        for j in range(Z.shape[1]):
            a, b = Z[:, i] - Z[:, i].mean(), Z[:, j] - Z[:, j].mean()
            total = total + ((a @ b) / scale(a, b)) ** 2 if i != j else total
    return total


def loop_vicreg(Z1, Z2, scale=lambda a, b: len(a) - 1, weight=1):
    loss = 25 * sum(((a - b) ** 2).sum() for a, b in zip(Z1, Z2)) / Z1.numel()
    for Z in (Z1, Z2):
        loss = loss + 25 * loop_variance(Z) + weight * loop_off_diagonal(Z, scale) / Z.shape[1]
    return loss


def loop_vbcreg(Z1, Z2):
    """Correlations instead of covariances, and their mean over F x F."""
    return loop_vicreg(Z1, Z2, lambda a, b: a.norm() * b.norm(), 100 / Z1.shape[1])


@pytest.mark.parametrize("B, n", [(4, 7), (9, 5)])  # the B x B form and the F x F form
@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "vbcreg"])
def test_ssl_loss_equals_its_loop_form(name, B, n):
    mix = torch.randn(n, n, dtype=torch.float64)
    Z1 = (0.5 * torch.randn(B, n, dtype=torch.float64) @ mix).requires_grad_()
    Z2 = (Z1.detach() + 0.3 * torch.randn(B, n, dtype=torch.float64)).requires_grad_()
    loop = {"barlow_twins": loop_barlow, "vicreg": loop_vicreg, "vbcreg": loop_vbcreg}[name]
    expected = loop(Z1, Z2)
    loss = sum(getattr(ssl_losses, name)(Z1, Z2).values())
    assert torch.allclose(loss, expected, rtol=1e-10)
    for a, b in zip(torch.autograd.grad(loss, (Z1, Z2)), torch.autograd.grad(expected, (Z1, Z2))):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-12)


def test_off_diagonal_squares_in_both_forms():
    A, B = torch.randn(2, 6, 20, dtype=torch.float64, requires_grad=True).unbind()
    C = A.T @ B
    direct = (C - C.diagonal().diag()).square().sum()
    short = ssl_losses.off_diagonal_squares(A, B)
    assert torch.allclose(direct, short, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(direct, (A, B)), torch.autograd.grad(short, (A, B))):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_barlow_is_zero_at_the_identity():
    Z = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 3 + 5  # C = I
    assert all(term.abs() < 1e-10 for term in ssl_losses.barlow_twins(Z, Z).values())


def test_vbcreg_covariance_is_a_correlation():
    Z = torch.randn(16, 40).cumsum(1)
    term = ssl_losses.decorrelation(Z)
    assert 0 <= term < 1
    assert torch.allclose(term, ssl_losses.decorrelation(Z * torch.logspace(-2, 2, 40)), rtol=1e-4)
    assert 0.9 < ssl_losses.decorrelation(torch.randn(16, 1).expand(16, 40)) < 1


def test_losses_are_fp32_under_autocast():
    Z1, Z2 = torch.randn(2, 16, 64)
    for loss in (ssl_losses.barlow_twins, ssl_losses.vicreg, ssl_losses.vbcreg):
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(Z1, Z2)
        assert all(torch.equal(inside[k], v) for k, v in loss(Z1, Z2).items())


def test_iternorm_whitens():
    Z = torch.randn(4000, 8) @ (torch.eye(8) + 0.15 * torch.randn(8, 8)) + 3
    out = ssl_losses.IterNorm(8, group_size=8, T=7)(Z)
    assert torch.allclose(out.mean(0), torch.zeros(8), atol=1e-4)
    assert torch.allclose(out.T.cov(), torch.eye(8), atol=0.02)


def test_iternorm_gradient():
    layer = ssl_losses.IterNorm(4, group_size=2).double()
    Z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, Z)


def test_iternorm_running_statistics():
    layer = ssl_losses.IterNorm(4, group_size=4, momentum=1.0)
    Z = torch.randn(50, 4) * torch.tensor([1.0, 2, 3, 4])
    trained = layer(Z)
    fresh = ssl_losses.IterNorm(4, group_size=4)
    fresh.load_state_dict(layer.state_dict())
    assert torch.allclose(fresh.eval()(Z), trained, atol=1e-5)
    assert torch.allclose(fresh(Z[:1]), fresh(Z)[:1], atol=1e-6)  # eval looks at no batch
    assert torch.equal(fresh.running_mean, layer.running_mean)


def test_iternorm_with_fewer_rows_than_features():
    Z = torch.randn(4, 64, requires_grad=True)
    out = ssl_losses.IterNorm(64)(Z)
    out.square().sum().backward()
    assert out.isfinite().all() and Z.grad.isfinite().all()


# ---- maskgit.py ---------------------------------------------------------------------------------


def test_masked_share():
    s = torch.zeros(20000, 256, dtype=torch.long)
    is_masked = maskgit.mask_tokens(s)
    assert is_masked.float().mean().item() == pytest.approx(2 / math.pi, abs=0.01)
    assert is_masked.sum(1).min() >= 1
    assert is_masked.float().mean(0).std() < 0.01  # every position alike
    linear = maskgit.mask_tokens(s, "linear").float().mean().item()
    assert linear == pytest.approx(0.5, abs=0.01)


def test_loss_looks_at_masked_tokens_only():
    logits, s = torch.randn(3, 10, 5), torch.randint(5, (3, 10))
    is_masked = maskgit.mask_tokens(s)
    loss = maskgit.masked_cross_entropy(logits, s, is_masked)
    other = logits + 100 * torch.randn_like(logits) * ~is_masked[..., None]
    assert torch.equal(loss, maskgit.masked_cross_entropy(other, s, is_masked))
    assert torch.allclose(loss, F.cross_entropy(logits[is_masked], s[is_masked]))


@pytest.mark.parametrize("schedule", maskgit.SCHEDULES)
def test_decoding_follows_the_schedule(schedule):
    K, N, T = 6, 40, 8
    s_M = torch.full((5, N), K)
    canvases = maskgit.decode(lambda s: torch.randn(*s.shape, K), s_M, K, T, schedule)
    for t in range(1, T + 1):
        r = t / T
        gamma = {"cosine": math.cos(math.pi / 2 * r), "linear": 1 - r, "square": 1 - r**2,
                 "cubic": 1 - r**3}[schedule]
        expected = min(math.floor(gamma * N + 1e-6), (canvases[t - 1][0] == K).sum().item() - 1)
        assert ((canvases[t] == K).sum(1) == expected).all()
        was_known = canvases[t - 1] != K
        assert torch.equal(canvases[t][was_known], canvases[t - 1][was_known])
    assert canvases[-1].max() < K


def test_decoding_settles_one_entry_a_step_and_keeps_what_is_known():
    K, N = 6, 12
    s_M = torch.randint(K, (4, N)).masked_fill(torch.rand(4, N) < 0.5, K)
    s_M[0] = K
    s_M[1] = 2  # nothing to do
    canvases = maskgit.decode(lambda s: torch.randn(*s.shape, K), s_M, K, 50)
    counts = (canvases == K).sum(2)
    assert ((counts[:-1] - counts[1:] >= 1) | (counts[:-1] == 0)).all() and (counts[-1] == 0).all()
    assert torch.equal(canvases[-1][s_M != K], s_M[s_M != K])


def test_revisions_keep_what_is_given():
    K, N = 6, 40
    s_M = torch.randint(K, (4, N)).masked_fill(torch.rand(4, N) < 0.7, K)
    seen = []
    logits_fn = lambda s: seen.append((s == K).sum(1)) or torch.randn(*s.shape, K)
    canvases = maskgit.decode(logits_fn, s_M, K, 5, n_revisions=3)
    assert len(canvases) == 1 + 5 + 3 and canvases[5:].max() < K
    assert (canvases[:, s_M != K] == s_M[s_M != K]).all()
    quarter = (s_M == K).sum(1) // 4
    for revision in range(5, 5 + 3 * 4, 4):  # read what stands there, then fill in three steps
        assert seen[revision].sum() == 0 and torch.equal(seen[revision + 1], quarter)
    assert len(seen) == 5 + 3 * 4
    sure = torch.full((4, N, K), -9.0).scatter(2, canvases[-1][..., None], 9.0)
    assert torch.equal(maskgit.decode(lambda s: sure, s_M, K, n_revisions=2)[-1], canvases[-1])


def test_decoding_finds_the_only_possible_sequence():
    K, target = 5, torch.randint(5, (1, 20))
    logits = torch.full((1, 20, K), -math.inf).scatter(2, target[..., None], 0.0)
    s = maskgit.decode(lambda s: logits.expand(len(s), -1, -1), torch.full((3, 20), K), K)[-1]
    assert torch.equal(s, target.expand(3, -1))


def test_guidance():
    prior = maskgit.MaskGIT(6, 8, n_classes=3, width=16, n_layers=1).eval()
    s_M, y = torch.full((4, 8), 6), torch.tensor([0, 1, 2, 0])
    assert torch.equal(maskgit.guided(prior, y, 1.0)(s_M), prior(s_M, y))
    assert torch.allclose(maskgit.guided(prior, y, 0.0)(s_M), prior(s_M), atol=1e-5)
    two = prior(s_M) + 2 * (prior(s_M, y) - prior(s_M))
    assert torch.allclose(maskgit.guided(prior, y, 2.0)(s_M), two, atol=1e-5)


def test_label_dropout_in_training_only():
    prior = maskgit.MaskGIT(6, 8, n_classes=3, width=16, n_layers=1, label_dropout=1.0)
    s_M, y = torch.full((4, 8), 6), torch.tensor([0, 1, 2, 0])
    assert torch.equal(prior(s_M, y), prior(s_M, None))
    prior.eval()
    assert not torch.allclose(prior(s_M, y)[0], prior(s_M, y)[1])


def test_shifts_are_told_apart_and_the_middle_one_is_drawn():
    prior = maskgit.MaskGIT(6, 8, n_classes=3, n_shifts=5, width=16, n_layers=1).eval()
    s_M, y = torch.full((5, 8), 6), torch.zeros(5, dtype=torch.long)
    each = prior(s_M, y, torch.arange(5))
    assert torch.equal(prior(s_M, y)[2], each[2]) and len(each.unique(dim=0)) == 5


def test_bound_of_a_uniform_prior_is_n_log_k():
    K, N = 7, 12
    bound = maskgit.nll_bound(lambda s: torch.zeros(*s.shape, K), torch.randint(K, (50, N)), K)
    assert torch.allclose(bound, torch.full((50,), N * math.log(K)))


def test_tokens_drawn_at_a_temperature():
    distance = torch.tensor([0.0, 1.0, 3.0]).expand(200, 100, 3)
    assert (train_stage2.draw_tokens(distance, 1e-3) == 0).all()
    share = F.one_hot(train_stage2.draw_tokens(distance, 2.0), 3).float().mean((0, 1))
    assert torch.allclose(share, torch.tensor([0.0, -0.5, -1.5]).softmax(0), atol=0.02)


# ---- data.py ------------------------------------------------------------------------------------


def test_synthetic_set():
    d = data.load("synthetic")
    assert d.x_train.shape == (1000, 1, 128) and d.x_test.shape == (4000, 1, 128)
    assert d.classes == ["1", "2", "3", "4"]
    assert all(200 < n < 300 for n in d.y_train.bincount())
    x, y = d.x_train * d.std + d.mean, d.y_train
    assert torch.allclose(x.mean(2), torch.zeros(1000, 1), atol=1e-5)
    assert torch.allclose(x.std(2), torch.ones(1000, 1), atol=1e-4)
    ok, label, (start, l1, gap, l2) = fit_two_steps(x[:, 0])
    assert ok.all() and torch.equal(label, y)
    assert start.min() == 0 and start.max() > 60 and gap.min() == 0 and gap.max() > 60
    for length in (l1, l2):
        assert 16 <= length.min() <= 17 and length.max() == 32
    assert torch.equal(d.x_train, data.load("synthetic").x_train)


def fit_two_steps(x):
    """Best two flat patterns of a TwoPatterns series x (n,128), by least squares over all pairs.

    Returns whether x is well-formed (at most 6 samples off by over half a level, at most 3 of them
    inside a pattern), its class 0..3, and start, first length, gap, second length.
    """
    T, l = torch.tensor([(t, l) for l in range(16, 33) for t in range(129 - l)]).T
    middle, end = T + (l + 1) // 2, T + l
    level = x.abs().topk(24, 1).values.median(1, keepdim=True).values
    total = F.pad(x.cumsum(1), (1, 0))
    fall = 2 * total[:, middle] - total[:, T] - total[:, end]  # of first half over second
    cost = l * level**2 - 2 * level * fall.abs()  # against a background of zero
    until = torch.full((len(x), 129), math.inf).scatter_reduce(1, end.expand_as(cost), cost, "amin")
    since = torch.full((len(x), 129), math.inf).scatter_reduce(1, T.expand_as(cost), cost, "amin")
    cut = until.cummin(1).values + since.flip(1).cummin(1).values.flip(1)
    cut = cut.argmin(1, keepdim=True)
    best = torch.stack([cost.where(end <= cut, math.inf).argmin(1),
                        cost.where(T >= cut, math.inf).argmin(1)])  # (2,n)
    t, shape = torch.arange(128), 0
    for i in best:
        sign = fall.gather(1, i[:, None]).sign()
        first, second, last = (v[i][:, None] for v in (T, middle, end))
        inside = ((t >= first) & (t < last)).float()
        shape = shape + sign * level * inside * torch.where(t < second, 1.0, -1.0)
    is_off = (x - shape).abs() > 0.5 * level
    ok = (is_off.sum(1) <= 6) & ((is_off & (shape != 0)).sum(1) <= 3)
    is_up = torch.stack([fall.gather(1, i[:, None])[:, 0] < 0 for i in best])
    params = T[best[0]], l[best[0]], T[best[1]] - end[best[0]], l[best[1]]
    return ok, is_up[0] + 2 * is_up[1], params


def ks_distance(a, b):
    """Kolmogorov-Smirnov distance of two samples (n), (m): 0 alike, 1 apart."""
    values = torch.cat([a, b]).unique()
    below_a, below_b = ((v[:, None] <= values).float().mean(0) for v in (a, b))
    return (below_a - below_b).abs().max().item()


def judge_two_patterns(run):
    """Print how many of a TwoPatterns run's generated and reconstructed test series, with noise,
    are well-formed and of their class, and how far the distributions of these two are apart.
    """
    stage1 = data.load_checkpoint(Path(run) / "stage1.pt", stage=1)
    model = data.rebuild(vqvae.VQVAE, stage1["arguments"], stage1["model"], "cpu")
    d = data.load_again(stage1, "cpu")
    with np.load(Path(run) / "samples.npz") as file:
        x, names = (torch.tensor(file["x"]) - d.mean) / d.std, file["y"]
    torch.manual_seed(0)
    x_rec = data.in_batches(lambda rows: model.detokenise(model.tokenise(rows), 1.0), d.x_test)
    distributions = []
    for name, v, y in (("generated", x, torch.tensor([d.classes.index(c) for c in names])),
                       ("reconstructed", x_rec, d.y_test)):
        ok, label, params = fit_two_steps(v[:, 0])
        is_good = ok & (label == y)
        print(f"{name}: {is_good.float().mean():.3f} well-formed")
        distributions.append([values[is_good] for values in params])
    distances = [f"{ks_distance(a, b):.3f}" for a, b in zip(*distributions)]
    print("KS distances of start, first length, gap, second length:", *distances)


def test_ks_distance_by_hand():
    a = torch.tensor([1, 2, 3, 4])
    assert ks_distance(a, a.repeat(3)) == 0 and ks_distance(a, a + 4) == 1
    assert ks_distance(a, torch.tensor([2, 3, 4, 5])) == 0.25


def test_synthetic_set_is_like_the_real_one():
    real, ours = data.load("TwoPatterns", ucr("TwoPatterns")), data.load("synthetic")
    real, ours = (torch.cat([d.x_train, d.x_test])[:, 0] for d in (real, ours))
    assert (real.var(0) - ours.var(0)).abs().max() < 0.08
    for lag in (1, 2, 4, 8, 16, 32):
        a, b = ((x[:, lag:] * x[:, :-lag]).mean().item() for x in (real, ours))
        assert a == pytest.approx(b, abs=0.02), lag
    ok, label, params = fit_two_steps(real)
    assert ok.all()
    for a, b in zip(params, fit_two_steps(ours)[2]):
        assert (a.float().mean() - b.float().mean()).abs() < 1.5


def test_deviation_loss_is_lowest_at_the_deviation():
    error = (3 * torch.randn(100_000, dtype=torch.float64)).abs()
    log_deviation = torch.tensor(math.log(3.0)).double().requires_grad_()
    train_stage1.deviation_loss(error, log_deviation).backward()
    assert abs(log_deviation.grad) < 0.01
    by_hand = train_stage1.deviation_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]))
    c = math.sqrt(math.pi / 2)
    assert by_hand.item() == pytest.approx((c + 1 + 3 * c / math.e) / 2)


def test_augmentations():
    x = torch.randn(64, 2, 50)
    assert torch.allclose(data.window_warp(x, slowest=1.0, fastest=1.0), x, atol=1e-4)
    line = torch.linspace(0, 1, 50).expand(64, 2, 50)
    warped = data.window_warp(line)
    assert torch.allclose(warped[..., [0, -1]], line[..., [0, -1]], atol=1e-5)
    assert (warped.diff() > 0).all() and not torch.allclose(warped, line, atol=0.02)
    ratio = data.amplitude_resize(x) / x
    assert torch.allclose(ratio, ratio[:, :1, :1].expand_as(x), rtol=1e-3)
    assert 0.1 < ratio[:, 0, 0].std() < 0.3
    shuffled = data.slice_and_shuffle(torch.arange(50.0).expand(64, 2, 50))
    assert torch.equal(shuffled.sort(2).values, torch.arange(50.0).expand(64, 2, 50))
    assert ((shuffled.diff() != 1).sum(2) <= 3).all() and (shuffled.diff() != 1).any()
    assert (data.gaussian_noise(x) - x).std().item() == pytest.approx(0.05, abs=0.005)
    assert torch.equal(data.augment(x, []), x)


def test_time_shift_by_hand():
    x = torch.arange(5).expand(5, 2, 5)
    moved = data.time_shift(x, torch.arange(-2, 3)[:, None])
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert moved[:, 0].tolist() == [
        [2, 1, 0, 1, 2], [1, 0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 2, 3, 4, 3], [2, 3, 4, 3, 2]]
    for i, by in enumerate(train_stage2.even_shifts(2)):
        assert torch.equal(data.time_shift(x, by)[i], moved[i])
    for most, n in ((0, 1), (1, 3), (4, 9), (7, 15), (8, 9), (64, 9), (101, 9)):
        shifts = [*train_stage2.even_shifts(most)]
        assert len(shifts) == n and shifts[n // 2] == 0 and most - 4 < shifts[-1] <= most


SHAPES = {"ECG5000": (500, 4499, 140, 5), "GunPoint": (50, 150, 150, 2),
          "ItalyPowerDemand": (67, 1029, 24, 2), "DodgerLoopDay": (78, 80, 288, 7),
          "AllGestureWiimoteX": (300, 700, 385, 10)}


@pytest.mark.parametrize("name", SHAPES)
def test_real_files(name, capsys):
    d = data.load(name, ucr(name))
    n, m, L, n_classes = SHAPES[name]
    assert d.x_train.shape == (n, 1, L) and d.x_test.shape == (m, 1, L)
    assert len(d.classes) == n_classes and d.y_train.max() == n_classes - 1
    assert d.x_train.isfinite().all() and d.x_test.isfinite().all()
    assert d.x_train.mean().abs() < 1e-4 and d.x_train.std().item() == pytest.approx(1, abs=1e-3)
    said = {"DodgerLoopDay": "11 with gaps filled", "AllGestureWiimoteX": "299 series stretched"}
    assert said.get(name, "") in capsys.readouterr().out


def test_ts_and_txt_are_the_same_set(tmp_path):
    for ending in ("ts", "txt"):
        source = ucr("ECG200", ending) / "ECG200"
        (tmp_path / ending).mkdir()
        for split in ("TRAIN", "TEST"):
            shutil.copy(source / f"ECG200_{split}.{ending}", tmp_path / ending)
    ts, txt = (data.load("ECG200", tmp_path / ending) for ending in ("ts", "txt"))
    assert ts.classes == txt.classes == ["-1", "1"]
    assert torch.allclose(ts.x_test, txt.x_test, atol=1e-5) and torch.equal(ts.y_test, txt.y_test)


def table(folder, train, test="1 0 0 1 1 2 2 3 3\n2 1 0 2 1 4 2 5 3\n", ending="tsv"):
    """The set Own of these two files, texts or bytes, in `folder`."""
    for split, content in (("TRAIN", train), ("TEST", test)):
        content = content if isinstance(content, bytes) else content.encode()
        (folder / f"Own_{split}.{ending}").write_bytes(content)
    return folder


def test_gaps_tails_and_labels_by_hand(tmp_path, capsys):
    row = " ".join(map(str, range(10)))
    short = "0 NaN 4 6 8 NaN 12 14 NaN NaN"  # eight samples long, two of them missing
    folder = table(tmp_path, f"10 {row}\n9 {short}\n", f"9 {row}\n10 {row}\n")
    d = data.load("Own", folder)
    assert d.classes == ["9", "10"] and d.y_train.tolist() == [1, 0] and d.y_test.tolist() == [0, 1]
    assert "train: 1 series stretched to 10, 1 with gaps filled" in capsys.readouterr().out
    x = d.x_train * d.std + d.mean
    assert torch.allclose(x[1, 0], torch.linspace(0, 14, 10), atol=1e-5)
    assert torch.allclose(x[0, 0], torch.arange(10.0), atol=1e-5)


def test_odd_files_that_are_read(tmp_path):
    row = ",".join("12345678")
    ts = f"# caf\xe9\n{TS}@data\n{row} : a\n{row}:b \n".encode("latin-1")
    rows(ts, "ts")(tmp_path)
    assert data.load("Own", tmp_path).classes == ["a", "b"]
    lines = [f"{label}\t" + row.replace(",", "\t") for label in (1234567890124, 1234567890123)]
    d = data.load("Own", table(tmp_path, "\ufeff" + "\n".join(lines), lines[0]))
    assert d.classes == ["1234567890123", "1234567890124"] and d.y_train.tolist() == [1, 0]
    huge = "\n".join(f"{c} " + " ".join(f"{v}e30" for v in range(c, c + 9)) for c in (1, 2))
    assert data.load("Own", table(tmp_path, huge, huge)).x_train.abs().max() < 3


def test_own_arrays_with_channels_and_without_labels(tmp_path):
    x = np.random.default_rng(0).normal(size=(12, 3, 16))
    np.savez(tmp_path / "own.npz", x_train=x * [[1], [10], [0]] + 0.1, x_test=x[:5])
    d = data.load(str(tmp_path / "own.npz"))
    assert d.x_train.shape == (12, 3, 16) and d.y_train is None and d.classes == []
    assert torch.allclose(d.x_train.std((0, 2), correction=0), torch.tensor([1.0, 1, 0]), atol=1e-4)


# ---- download, from a server of our own ---------------------------------------------------------


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


ROWS = "1 " + " ".join("123456789") + "\n2 " + " ".join("987654321") + "\n"
GOOD = zipped({"Own_TRAIN.txt": ROWS, "Own_TEST.txt": ROWS, "README.md": "more"})
DAMAGED = GOOD[:43] + b"\xff" * 9 + GOOD[52:]  # the first member begins at byte 43
FOLDER = zipped({"Own/Own_TRAIN.txt": ROWS, "Own/Own_TEST.txt": ROWS})


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        kind = self.path.split("/")[1]
        bodies = {"good": GOOD, "folder": FOLDER, "cut": GOOD, "nozip": b"<html>hello</html>",
                  "other": zipped({"Else_TRAIN.txt": ROWS}), "empty": b"", "damaged": DAMAGED,
                  "climbs": zipped({"../Own_TRAIN.txt": ROWS, "../Own_TEST.txt": ROWS})}
        if kind == "slow":
            time.sleep(1.5)
        if kind not in bodies:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(bodies[kind])))
        self.end_headers()
        self.wfile.write(bodies[kind][: len(GOOD) // 2 if kind == "cut" else None])

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("kind", ["good", "folder"])
def test_download(kind, server, tmp_path):
    data.load("Own", tmp_path, mirrors=[f"{server}/{kind}/{{}}.zip"])
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["Own_TEST.txt", "Own_TRAIN.txt"]
    assert data.load("Own", tmp_path, mirrors=[]).x_train.shape == (2, 1, 9)  # now from disk


def test_downloads_at_once(server, tmp_path):
    code = "import data, sys, pathlib as p; data.fetch('Own', p.Path(sys.argv[1]), [sys.argv[2]])"
    command = [sys.executable, "-c", code, str(tmp_path), f"{server}/good/{{}}.zip"]
    both = [subprocess.Popen(command, cwd=HERE, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert sorted(p.name for p in (tmp_path / "Own").iterdir()) == ["Own_TEST.txt", "Own_TRAIN.txt"]


@pytest.mark.parametrize("kind, message", [
    ("missing", "404"), ("slow", "timed out"), ("cut", "cut off after"), ("nozip", "not a zip"),
    ("other", "holds no Own_TRAIN"), ("climbs", "holds no Own_TRAIN"), ("empty", "not a zip"),
    ("damaged", "decompressing"),
])
def test_failed_download(server, tmp_path, kind, message):
    mirrors = [f"{server}/{kind}/{{}}.zip", "http://127.0.0.1:9/{}.zip"]
    with pytest.raises(OSError, match=message) as error:
        data.fetch("Own", tmp_path / "in", mirrors, timeout=0.5)
    assert all(m.format("Own") in str(error.value) for m in mirrors)
    assert str(tmp_path / "in" / "Own") in str(error.value)
    assert "by hand" in str(error.value) and not list(tmp_path.rglob("*"))
    data.fetch("Own", tmp_path / "in", [mirrors[0], f"{server}/good/{{}}.zip"], timeout=0.5)
    assert len(list((tmp_path / "in" / "Own").iterdir())) == 2  # the mirror served


# ---- metrics ------------------------------------------------------------------------------------


def test_probes():
    Y = torch.tensor([[-1.0, 0], [-0.9, 0.2], [-0.8, -0.2], [1, 0], [0.9, 0.1], [0.8, -0.1]])
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    for classify in (train_stage1.linear_probe, train_stage1.nearest_neighbours):
        assert torch.equal(classify(Y, y, Y + 0.05), y)
    # the margin of +1 and -3 is at -1
    Y, y = torch.tensor([[1.0], [-3.0]]), torch.tensor([1, 0])
    between = torch.tensor([[-1.3], [-0.7]])
    assert train_stage1.linear_probe(Y, y, between, penalty=1e4).tolist() == [0, 1]
    far = torch.cat([torch.zeros(2, 1), torch.ones(3, 1)])
    assert train_stage1.nearest_neighbours(far, torch.tensor([0, 0, 1, 1, 1]), far[:1]).item() == 1


def test_frechet_distance_by_hand():
    a = torch.randn(5000, 3, dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T  # exactly N(0, I)
    b = a * torch.tensor([2.0, 1, 3]) + torch.tensor([1.0, 0, 0])
    # |mu|^2 + sum (sigma_a - sigma_b)^2
    assert sample.frechet_distance(a, b) == pytest.approx(1 + 1 + 0 + 4, abs=1e-6)
    assert sample.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    flat = torch.randn(20, 2).repeat(1, 30)  # rank 2 of 60, fewer rows than features
    assert sample.frechet_distance(flat, flat) == pytest.approx(0, abs=1e-3)
    assert math.isfinite(sample.frechet_distance(flat, torch.randn(20, 60)))


def test_inception_score_by_hand():
    assert sample.inception_score(torch.zeros(10, 4)) == pytest.approx(1)
    assert sample.inception_score(1000 * torch.eye(4).repeat(5, 1)) == pytest.approx(4)
    half = torch.log(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    expected = math.exp(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert sample.inception_score(half) == pytest.approx(expected)


def test_nearest_distance():
    x_train = torch.zeros(3, 1, 4) + torch.tensor([0.0, 5, 9]).view(3, 1, 1)
    x = torch.ones(2, 1, 4) * torch.tensor([1.0, 5]).view(2, 1, 1)
    assert sample.nearest_distance(x, x_train) == pytest.approx((2 + 0) / 2)


# ---- the scripts --------------------------------------------------------------------------------

FILES = {"stage1.pt", "stage1.jsonl", "stage1.png", "reconstructions.png", "views.png",
         "classes.png", "stage2.pt", "stage2.jsonl", "stage2.png", "metrics.json", "samples.npz",
         "samples.png", "decoding.png"}
TERMS = {
    "none": {"mse_x", "mse_u", "commitment"},
    "barlow": {"invariance", "redundancy"},
    "vicreg": {"similarity", "variance", "covariance"},
    "vbcreg": {"similarity", "expressiveness", "decorrelation"},
}


@pytest.mark.parametrize("ssl", TERMS)
def test_end_to_end(ssl, small, tmp_path, capsys):
    run = tmp_path / "run"
    script("train_stage1", "--dataset", small, "--ssl", ssl, "--run", run, *TINY1)
    records = [json.loads(line) for line in (run / "stage1.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2]
    views = {"view_mse_x", "view_mse_u"} if ssl != "none" else set()
    assert set(records[0]) == TERMS[ssl] | TERMS["none"] | views | {
        "epoch", "deviation", "gradient_norm", "perplexity", "codes_used"}
    before = weights(run / "stage1.pt")
    ran = script("train_stage2", "--run", run, *TINY2)
    assert same(before, list(ran["vqvae"].state_dict().values()))
    assert same(before, weights(run / "stage1.pt"))
    lines = (run / "stage2.jsonl").read_text().splitlines()
    logged = {"epoch", "loss", "accuracy", "gradient_norm"}
    assert [set(json.loads(line)) for line in lines] == [logged] * 2
    script("sample", "--run", run, "--n", 7)
    assert {p.name for p in run.iterdir()} == FILES
    with np.load(run / "samples.npz") as drawn:
        assert drawn["x"].shape == (7, 1, 32) and drawn["s"].shape == (7, 5 * 8)
        assert np.isfinite(drawn["x"]).all() and set(drawn["y"]) <= {"0", "1", "2"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 <= metrics["stage1"]["linear_probe"] <= 1 and metrics["stage1"]["perplexity"] >= 1
    assert metrics["stage2"]["uniform_nats_per_token"] == pytest.approx(math.log(32))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "series_per_second" in last and "peak_MiB" in last


def test_same_seed_same_bits(small, finished, tmp_path):
    train(small, tmp_path)
    for file in ("stage1.pt", "stage2.pt"):
        assert same(weights(finished / file), weights(tmp_path / file))
    drawn = []
    for seed in (3, 3, 4):
        script("sample", "--run", tmp_path, "--n", 4, "--seed", seed)
        drawn.append(np.load(tmp_path / "samples.npz")["x"])
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name, ending", [*((name, "tsv") for name in SHAPES),
                                          ("ECG200", "ts"), ("ECG200", "txt")])
def test_real_input_through_all_scripts(name, ending, tmp_path):
    run = tmp_path / "run"
    for split in ("TRAIN", "TEST"):
        lines = (ucr(name, ending) / name / f"{name}_{split}.{ending}").open().readlines()
        (tmp_path / f"{name}_{split}.{ending}").write_text("".join(lines[:200]))
    script("train_stage1", "--dataset", name, "--data-dir", tmp_path, "--run", run,
           "--epochs", 1, "--proj-dim", 64)
    script("train_stage2", "--run", run, "--epochs", 1)
    script("sample", "--run", run, "--n", 1)
    L = SHAPES[name][2] if name in SHAPES else 96
    drawn = np.load(run / "samples.npz")
    assert drawn["x"].shape == (1, 1, L) and drawn["y"].shape == (1,)


def test_without_run_and_by_the_alias(small, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "z")  # older, and last by name
    script("train_stage1", "--dataset", small, "--ssl", "vibcreg", *TINY1)
    script("train_stage2", *TINY2)
    script("sample", "--n", 2)
    assert capsys.readouterr().out.count("run: runs/small-vbcreg\n") == 2
    assert (tmp_path / "runs" / "small-vbcreg" / "samples.npz").exists()


def test_ten_thousand_series(finished, tmp_path):
    run = copy(finished, tmp_path)
    script("sample", "--run", run, "--n", 10000, "--steps", 1, "--revisions", 0)
    assert len(np.load(run / "samples.npz")["x"]) == 10000
    assert json.loads((run / "metrics.json").read_text())["samples"]["peak_MiB"] < 4096


def test_tokens_are_computed_once(finished, tmp_path, monkeypatch):
    shutil.copy(finished / "stage1.pt", tmp_path)
    encode, rows = vqvae.VQVAE.encode, []
    monkeypatch.setattr(vqvae.VQVAE, "encode",
                        lambda model, x: rows.append(len(x)) or encode(model, x))
    script("train_stage2", "--run", tmp_path, *TINY2)
    assert sum(rows) == 3 * 40 + 24  # under shifts of -1, 0 and 1


WALKS = np.random.default_rng(0).normal(size=(30, 3, 16)).cumsum(2)
ONES = {"x_train": np.ones((8, 16)), "y_train": [0, 1] * 4,
        "x_test": np.ones((1, 16)), "y_test": [1]}


def walks(y_train, y_test):
    return {"x_train": WALKS[:, 0], "y_train": y_train, "x_test": WALKS[:, 0], "y_test": y_test}


NAMES = [f"$\\frac{{{i}$" for i in range(15)] * 2
RARE = ["b"] * 29 + ["a"]
EVALUATE = ("--evaluate", "--fcn-steps", 3)
ODD = {  # name: arrays of own.npz, flags of stage 1, flags of sample
    "15 classes of odd names": (walks(NAMES, NAMES), (), ()),
    "one class": (walks(["a"] * 30, ["a"] * 30), (), EVALUATE),
    "a class of one": (walks(RARE, RARE), (), EVALUATE),
    "no test row of a class": (walks(RARE, ["b"] * 30), (), EVALUATE),
} | {f"no variance, one test row, {ssl}": (ONES, ("--ssl", ssl), ()) for ssl in TERMS}


@pytest.mark.parametrize("case", ODD)
def test_odd_data_through_all_scripts(case, tmp_path):
    arrays, flags1, flags = ODD[case]
    np.savez(tmp_path / "own.npz", **arrays)
    run = train(tmp_path / "own.npz", tmp_path / "run", flags1)
    script("sample", "--run", run, "--n", 30, *flags)
    assert all(v.isfinite().all() for v in weights(run / "stage1.pt"))
    x = np.load(run / "samples.npz")["x"]
    assert np.isfinite(x).all() and x.shape == (30, 1, 16)
    lacking = {"classes.png"} if arrays is ONES else set()  # one row has no principal components
    assert {path.name for path in run.iterdir()} == FILES - lacking


def test_channels_and_no_labels_through_all_scripts(tmp_path):
    np.savez(tmp_path / "own.npz", x_train=WALKS, x_test=WALKS[:6])
    run = train(tmp_path / "own.npz", tmp_path / "run")
    script("sample", "--run", run, "--n", 3)
    script("sample", "--run", run, "--n", 3, "--impute", "4:9")
    assert all(v.isfinite().all() for v in weights(run / "stage1.pt"))
    for drawn, shape in (("samples", (3, 3, 16)), ("imputed", (3, 10, 3, 5))):
        x = np.load(run / f"{drawn}.npz")["x"]
        assert np.isfinite(x).all() and x.shape == shape and (run / f"{drawn}.png").exists()


def test_labels_and_priors(finished, tmp_path):
    run = copy(finished, tmp_path)
    for flags, labels in ((("--label", 2), {"2"}), (("--label", "none"), {""})):
        script("sample", "--run", run, "--n", 5, *flags)
        assert set(np.load(run / "samples.npz")["y"]) == labels
    script("sample", "--run", run, "--n", 400, "--prior", "uniform", "--revisions", 0)
    share = np.bincount(np.load(run / "samples.npz")["s"].ravel(), minlength=32) / (400 * 40)
    assert abs(share - 1 / 32).max() < 0.01


def test_evaluation_and_imputation(small, finished, tmp_path):
    run = copy(finished, tmp_path)
    for border in ("0:9", "25:32", "10:20"):
        script("sample", "--run", run, "--n", 40, "--impute", border, "--revisions", 1)
    script("sample", "--run", run, "--n", 40, "--evaluate", "--fcn-steps", 3)
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"stage1", "stage2", "samples", "imputed"}
    assert metrics["imputed"]["mse_mean_filling"] <= metrics["imputed"]["mse_one_filling"]
    with np.load(small) as f:
        x = (f["x_test"] - f["x_train"].mean()) / f["x_train"].std()
    line = [np.interp(range(10, 20), [9, 20], row[[9, 20]]) for row in x]
    error = ((x[:, 10:20] - line) ** 2).mean()
    assert metrics["imputed"]["mse_straight_line"] == pytest.approx(error, rel=1e-4)
    for of in ("real", "reconstructed", "generated"):
        assert metrics["samples"][f"fid_{of}"] >= 0
        assert 1 <= metrics["samples"][f"inception_{of}"] <= 3
        assert 0 <= metrics["samples"][f"cas_{of}"] <= 1
    assert metrics["samples"]["novelty"] > 0
    script("sample", "--run", run, "--n", 40, "--evaluate", "--fcn-steps", 4)
    again = json.loads((run / "metrics.json").read_text())["samples"]
    assert again["fid_real"] != metrics["samples"]["fid_real"]
    assert np.load(run / "imputed.npz")["x"].shape == (24, 10, 1, 10)


# ---- interruption and starting over -------------------------------------------------------------

LONG = ("--epochs", 20, "--save-every", 3)


@pytest.fixture(scope="session")
def uninterrupted(small, tmp_path_factory):
    return train(small, tmp_path_factory.mktemp("uninterrupted"), LONG, LONG)


@pytest.mark.parametrize("stage, how, after", [
    (1, signal.SIGTERM, 4), (1, signal.SIGKILL, 11), (2, signal.SIGINT, 11), (2, signal.SIGKILL, 5),
])
def test_interrupted_and_resumed_ends_bit_equal(stage, how, after, small, uninterrupted, tmp_path):
    name, flags = f"train_stage{stage}", (*TINY2, *LONG)
    if stage == 1:
        flags = (*TINY1, *LONG, "--dataset", small)
    else:
        shutil.copy(uninterrupted / "stage1.pt", tmp_path)
    log, path = (tmp_path / f"stage{stage}.{ending}" for ending in ("jsonl", "pt"))
    process = program(name, "--run", tmp_path, *flags)
    while not log.exists() or len(log.read_text().splitlines()) < after:
        time.sleep(0.005)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(how)
    error = process.communicate()[1]
    state = torch.load(path, weights_only=True)
    assert process.returncode != 0 and 3 <= state["epoch"] < 20
    if how != signal.SIGKILL:
        assert f"stopped after epoch {state['epoch']}; go on with" in error
    script(name, "--run", tmp_path, "--resume", *(flags if how == signal.SIGTERM else ()))
    assert log.read_text() == (uninterrupted / log.name).read_text()
    assert same(weights(path), weights(uninterrupted / path.name))


def test_a_kill_in_the_middle_of_a_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "stage1.pt"
    path.write_text("whole")
    code = ("import data, os, pathlib, sys\nos.replace = lambda *names: os.kill(os.getpid(), 9)\n"
            "data.write(pathlib.Path(sys.argv[1]), b'ha')")
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=HERE).returncode == -9
    assert path.read_text() == "whole"
    with pytest.raises(TypeError):
        data.write(tmp_path / "new" / "file", "text, not bytes")
    assert not list((tmp_path / "new").iterdir())


def test_checkpoints_of_a_gpu(finished, tmp_path):
    """The same file, with CUDA named as the device of its tensors, is read where there is none."""
    run = copy(finished, tmp_path)
    for name in ("stage1.pt", "stage2.pt"):
        with zipfile.ZipFile(finished / name) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        with zipfile.ZipFile(run / name, "w") as archive:
            for member, content in members.items():
                there = content.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0")
                assert (there != content) == member.endswith("data.pkl")
                archive.writestr(member, there)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA device"):
            torch.load(run / "stage2.pt", weights_only=True)
    assert same(weights(finished / "stage2.pt"), list(
        data.load_checkpoint(run / "stage2.pt", stage=2)["prior"].values()))
    script("train_stage2", "--run", run, "--resume")
    script("sample", "--run", run, "--n", 2)


def test_stages_that_do_not_belong_together(finished, small, tmp_path, capsys):
    run = copy(finished, tmp_path)
    (run / "stage1.pt").unlink()
    script("train_stage1", "--dataset", small, "--run", run, "--seed", 5, *TINY1)
    refused(capsys, "tokens of another stage1.pt", "sample", "--run", run)
    refused(capsys, "stage1.pt has changed since", "train_stage2", "--run", run, "--resume")


def test_a_finished_run_says_so_and_damaged_figures_are_named(finished, tmp_path, capsys):
    run = copy(finished, tmp_path)
    script("train_stage2", "--run", run, "--resume")
    assert "all 2 epochs are done already" in capsys.readouterr().out
    assert same(weights(run / "stage2.pt"), weights(finished / "stage2.pt"))
    for text in ("{", "[1]", '{"stage2": "x"}'):
        (run / "metrics.json").write_text(text)
        refused(capsys, "metrics.json: not figures of", "train_stage2", "--run", run, "--resume")


# ---- bad input ----------------------------------------------------------------------------------

GOOD_ROW = "1 " + " ".join("12345678") + "\n"
TS = "@univariate true\n@classLabel true a b\n"
TWO_TS = "@data\n1,2,3,4,5,6,7,8:a\n8,7,6,5,4,3,2,1:b\n"
X = np.arange(40.0).reshape(4, 10)


def rows(train, ending="tsv"):
    """A preparation: the set Own with this training file and a good test file."""
    good = TS + TWO_TS if ending == "ts" else GOOD_ROW + "2" + GOOD_ROW[1:]
    return lambda folder: table(folder, train, good, ending)


def arrays(x_train=X, x_test=X, y_train=None, y_test=None, train=None):
    """A preparation: own.npz of these arrays, None for none; `train` is a wrong name."""
    named = dict(x_train=x_train, x_test=x_test, y_train=y_train, y_test=y_test, train=train)
    return lambda folder: np.savez(folder / "own.npz", **{
        name: v for name, v in named.items() if v is not None})


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-code-ran",)


OWN = "train_stage1 --run new --dataset Own --data-dir ."
NPZ = "train_stage1 --run new --dataset own.npz"
BAD = {  # name: preparation, command, exit code, message; a finished run is in the folder run
    "comma": (rows("1,2,3,4\n"), OWN, 1, r"line 1: 0 values after the label, expected 1"),
    "ragged": (rows(GOOD_ROW + "2 1 2 3\n"), OWN, 1, r"TRAIN.tsv, line 2: 3 values .* expected 8"),
    "text": (rows(GOOD_ROW + "2 1 2 3 4 x 6 7 8\n"), OWN, 1, r"TRAIN.tsv, line 2: could not .*'x'"),
    "infinite": (rows(GOOD_ROW + "2 1 2 3 inf 5 6 7 8\n"), OWN, 1, r"line 2: an infinite value"),
    "one row": (rows(GOOD_ROW), OWN, 1, r"Own: 1 training, 2 test series; needs 2"),
    "all NaN": (rows(GOOD_ROW + "2" + " NaN" * 8), OWN, 1, r"train series 2: 0 channels with any"),
    "short": (rows("1 1 2 3\n2 3 2 1\n"), OWN, 1, r"series of length 3: at least 8 samples"),
    "unseen label": (rows("7 1 2 3 4 5 6 7 8\n" * 2), OWN, 1, r"labels \['1', '2'\] do not occur"),
    "binary": (rows(b"\xff\xfe\x00\x81"), OWN, 1, r"TRAIN.tsv: not a text file"),
    "ts length": (rows(TS + "@seriesLength 9\n" + TWO_TS, "ts"), OWN, 1,
                  r"line 5: channels of 8 values, .* 1 of 9"),
    "ts channels": (rows(TS + "@data\n1,2,3:4,5,6:a\n", "ts"), OWN, 1,
                    r"line 4: channels of 3, 3 values, .* 1 of 3"),
    "ts dimensions": (rows("@dimensions 3\n@classLabel true a\n@data\n1,2:3,4:a\n", "ts"), OWN, 1,
                      r"line 4: channels of 2, 2 values, .* 3 of 2"),
    "ts equal": (rows(TS + "@equalLength true\n@data\n1,2,3:a\n1,2:b\n", "ts"), OWN, 1,
                 r"line 6: channels of 2 values, .* 1 of 3"),
    "ts missing": (rows(TS + "@missing false\n@data\n1,?,3:a\n", "ts"), OWN, 1,
                   r"line 5: a missing value"),
    "ts ragged": (rows("@data\n1,2,3:4,5\n", "ts"), OWN, 1, r"of 3, 2 values, .* 2 of 3"),
    "array name": (arrays(None, train=X), NPZ, 1, r"no array x_train; it holds \['train', 'x_test"),
    "array shape": (arrays(X[0]), NPZ, 1, r"x_train must be finite numbers of shape \(N,L\)"),
    "array type": (arrays(X.astype(str)), NPZ, 1, r"x_train must be finite numbers"),
    "infinite array": (arrays(X + np.inf), NPZ, 1, r"x_train must be finite numbers"),
    "no test rows": (arrays(x_test=X[:0]), NPZ, 1, r"own.npz: 4 training, 0 test series"),
    "no samples": (arrays(X[:, :0]), NPZ, 1, r"train series 1: 0 channels with any"),
    "array labels": (arrays(y_train=X[0], y_test=X[:, 0]), NPZ, 1, r"y_train has shape \(10,\)"),
    "array channels": (arrays(x_test=X.reshape(4, 2, 5)), NPZ, 1, r"test series 1: 2 channels"),
    "objects": (arrays(np.array([X, "a"], object)), NPZ, 1, r"not an .npz of plain arrays"),
    "half the labels": (arrays(y_train=X[:, 0]), NPZ, 1, r"own.npz: labels of one split only"),
    "ts half": (lambda folder: table(folder, TS + TWO_TS, re.sub(":[ab]", "", TWO_TS), "ts"),
                OWN, 1, r"labels of one split only"),
    "NaN label": (rows(GOOD_ROW + "NaN" + GOOD_ROW[1:]), OWN, 1, r"a label is missing"),
    "beyond fp32": (arrays(X * 1e39), NPZ, 1, r"own.npz: values beyond 1e37"),
    "ts bare @": (rows("@\n" + TS + "@data\n1,2:c\n", "ts"), OWN, 1, r"line 5: label 'c' is not"),
    "no array file": (None, NPZ, 1, r"No such file or directory: 'own.npz'"),
    "npy": (lambda folder: np.save(open(folder / "own.npz", "wb"), X), NPZ, 1, r"not an .npz of"),
    "unwritable": (arrays(), "train_stage1 --dataset own.npz --run /proc/run", 1, r"/proc/run"),
    "stage 1 there": (None, "train_stage1 --run run", 1,
                      r"stage1.pt exists; go on from it by --resume, or choose another --run"),
    "stage 2 there": (None, "train_stage2 --run run", 1,
                      r"stage2.pt exists; go on from it by --resume, or choose another --run"),
    "no run yet": (None, "train_stage2", 1, r"no runs/\*/stage1.pt here; train that stage first"),
    "no such run": (None, "sample --run nowhere", 1, r"nowhere/stage1.pt: not there; run train_st"),
    "no such stage": (None, "train_stage1 --run nowhere --resume", 1,
                      r"nowhere/stage1.pt: not there, so nothing to --resume"),
    "F 100": (None, "train_stage1 --proj-dim 100", 2, "--proj-dim 100 is not a multiple of 64"),
    "other data": (None, "train_stage1 --run run --resume --dataset x", 2, "--dataset x contra"),
    "two flags": (None, "train_stage2 --run run --resume --lr 0.5 --batch-size 3", 2,
                  "--batch-size 3 contradicts 16 and --lr 0.5 contradicts"),
    "no loss": (None, "train_stage1 --ssl none --views 2", 2, "--ssl none has neither --ssl-w"),
    "label": (None, "sample --run run --label 9", 2, "--label 9: the classes are 0, 1, 2"),
    "one label": (None, "sample --run run --label 1 --evaluate", 2, "--evaluate needs labels"),
    "too few": (None, "sample --run run --n 3 --evaluate", 2, "--evaluate needs labels and at"),
    "no classifier": (None, "sample --run run --fcn-steps 9", 2, "--fcn-steps is of the class"),
    "no classes": (None, "sample --run run --prior uniform --label 1", 2, "uniform knows no class"),
    "guidance of none": (None, "sample --run run --label none --guidance 2", 2, "works by labels"),
    "impute 9": (None, "sample --impute 9", 2, "invalid stretch value: '9'"),
    "impute back": (None, "sample --impute 20:10", 2, "START must be below END"),
    "impute past": (None, "sample --run run --impute 20:33", 2, "ends at 33, but .* 32 samples"),
    "impute all": (None, "sample --run run --impute 0:32", 2, "--impute takes a part of the"),
}
WRONG = {  # script: a flag with a value that it refuses, what is said of it
    "train_stage1": {
        "epochs 0": "0 is not between 1 and inf", "epochs ten": "invalid int value: 'ten'",
        "batch-size 1": "1 is not between 2 and", "lr -1": "-1 is not between 0 and 1",
        "lr nan": "nan is not between 0 and 1", "codebook-size 1": "1 is not between 2 and 4096",
        "views 3": "invalid choice: 3", "ssl simclr": "invalid choice: 'simclr'",
        "ssl-weight -0.1": "-0.1 is not between 0", "augment flip": "invalid choice: 'flip'",
        "seed -1": "-1 is not between 0", "save-every 0": "0 is not between 1",
        "device tpu": "invalid choice: 'tpu'"},
    "train_stage2": {
        "schedule sine": "invalid choice: 'sine'", "batch-size 0": "0 is not between 1",
        "token-temperature -1": "-1 is not between 0"},
    "sample": {
        "n 0": "0 is not between 1",
        "n 1000000000000": "1000000000000 is not between 1 and 1000000",
        "steps 0": "0 is not between 1", "temperature -1": "-1 is not between 0",
        "guidance -1": "-1 is not between 0", "noise inf": "inf is not between 0",
        "prior ar": "invalid choice: 'ar'"},
}
BAD |= {f"{name} --{flag}": (None, f"{name} --{flag}", 2, f"--{flag.split()[0]}: .*{message}")
        for name, flags in WRONG.items() for flag, message in flags.items()}


PT = Path("run/stage2.pt")  # in the folder that test_bad_input has gone to
SPOILT = {  # name: a preparation
    "empty": lambda folder: PT.write_bytes(b""),
    "truncated": lambda folder: PT.write_bytes(PT.read_bytes()[:-5000]),
    "not utf-8": lambda folder: PT.write_bytes(b"\x80\x02X\x02\x00\x00\x00\xff\xfe."),
    "foreign": lambda folder: torch.save({"weights": torch.ones(3)}, PT),
    "foreign, staged": lambda folder: torch.save({"stage": 2}, PT),
    "a list": lambda folder: torch.save([torch.ones(3)], PT),
    "other stage": lambda folder: shutil.copy("run/stage1.pt", PT),
    "misfit": lambda folder: torch.save(torch.load(PT) | {"prior": {}, "arguments": {}}, PT),
    "hostile": lambda folder: torch.save(Hostile(), PT),
    "hostile pickle": lambda folder: PT.write_bytes(pickle.dumps(Hostile())),
}
NOT_WHOLE = "run/stage2.pt: not a whole stage-2 checkpoint"
SPOILT_MESSAGE = {
    "other stage": NOT_WHOLE + r".*\(it is of stage 1 and",
    "foreign, staged": NOT_WHOLE + r".*it is of stage 2 and holds \['stage'\]",
    "misfit":
        "a checkpoint's weights do not fit the MaskGIT|the checkpoint does not fit the script"}
BAD |= {f"checkpoint: {name}, {command}": (spoil, command, 1, SPOILT_MESSAGE.get(name, NOT_WHOLE))
        for name, spoil in SPOILT.items()
        for command in ("sample --run run", "train_stage2 --run run --resume")}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, finished, tmp_path, monkeypatch, capsys):
    """One line on stderr (after the usage for a flag), the exit code, and nothing has changed."""
    prepare, command, code, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    if prepare:
        prepare(tmp_path)
    everything = lambda: {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}
    before = everything()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script(*command.split())
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code and re.search(message, error[-1]), error
    assert code == 2 or len(error) == 1 and error[0].startswith(command.split()[0] + ".py: ")
    assert everything() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_as_a_program(tmp_path):
    process = program("sample", "--device", "cuda", cwd=tmp_path)
    assert re.fullmatch(r"sample.py: --device cuda: no CUDA .*\n", process.communicate()[1])
    assert process.returncode == 1


def test_signal_handlers_are_put_back_where_no_epoch_is_left(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert list(data.epochs(tmp_path, {}, {"epochs": 1}, [{"epoch": 1}], {"stage": 2})) == []
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_full_disk(small, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes a file
    process = program("train_stage1", "--dataset", small, "--run", tmp_path, *TINY1,
                      preexec_fn=limit)
    error = process.communicate()[1].strip().splitlines()[-1]
    assert process.returncode == 1 and error.startswith("train_stage1.py: ") and "large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["stage1.jsonl"]


def test_a_loss_that_is_not_finite_stops_the_run(small, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"mse_u became nan in epoch 3, step 2; .* is kept"):
        losses = [torch.ones(2), torch.tensor([1.0, math.nan])]
        data.finite_means(losses, ["mse_x", "mse_u"], 2, "run")
    with np.load(small) as arrays:
        arrays = dict(arrays)
    arrays["x_train"][3] = 1e36  # overflows where it is squared
    arrays["x_train"][4:] = arrays["x_train"][4:] * 0
    np.savez(tmp_path / "huge.npz", **arrays)
    script("train_stage1", "--dataset", tmp_path / "huge.npz", "--run", tmp_path / "a", *TINY1)
    refused(capsys, "became (nan|inf) in epoch 1, step", "train_stage1", "--dataset", small,
            "--run", tmp_path / "b", *TINY1, "--ssl-weight", 1e38)
    assert not (tmp_path / "b" / "stage1.pt").exists()


def test_a_nan_keeps_the_last_checkpoint(finished, tmp_path, capsys):
    path = copy(finished, tmp_path) / "stage2.pt"
    state = torch.load(path, weights_only=True)
    state["flags"]["epochs"] = 4
    state["prior"]["bias"][3] = math.nan
    torch.save(state, path)
    before = path.read_bytes()
    refused(capsys, "loss became nan in epoch 3, step 1; the last .* is kept", "train_stage2",
            "--run", path.parent, "--resume")
    assert path.read_bytes() == before


@pytest.mark.parametrize("flags", ["--batch-size 1000", "--batch-size 39", "--codebook-size 3000"])
def test_odd_sizes(flags, small, tmp_path):
    script("train_stage1", "--dataset", small, "--run", tmp_path, "--proj-dim", 64, "--epochs", 1,
           *flags.split())
    script("train_stage2", "--run", tmp_path, "--epochs", 1, "--batch-size", 39)
    assert all(v.isfinite().all() for v in weights(tmp_path / "stage1.pt"))


# ---- every flag has an effect -------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "--seed 1", "--augment gaussian_noise slice_and_shuffle", "--views 2", "--epochs 1", "--lr 0.1",
    "--augment window_warp", "--augment amplitude_resize", "--batch-size 8", "--proj-dim 128",
    "--codebook-size 8", "--ssl-weight 0.5", "--ssl barlow", "--token-noise 0", "--shift 0",
])
def test_stage1_flags(flags, small, finished, tmp_path):
    script("train_stage1", "--dataset", small, "--run", tmp_path, *TINY1, *flags.split())
    assert not same(weights(finished / "stage1.pt"), weights(tmp_path / "stage1.pt"))


@pytest.mark.parametrize("flags", [
    "--seed 1", "--epochs 1", "--batch-size 8", "--lr 0.1", "--schedule cosine", "--shift 0",
    "--token-temperature 9",
])
def test_stage2_flags(flags, finished, tmp_path):
    shutil.copy(finished / "stage1.pt", tmp_path)
    script("train_stage2", "--run", tmp_path, *TINY2, *flags.split())
    assert not same(weights(finished / "stage2.pt"), weights(tmp_path / "stage2.pt"))


@pytest.fixture(scope="session")
def drawn(finished, tmp_path_factory):
    run = copy(finished, tmp_path_factory.mktemp("drawn"))
    script("sample", "--run", run, "--n", 30)
    return np.load(run / "samples.npz")["x"]


@pytest.mark.parametrize("flags", [
    "--seed 1", "--label 1", "--steps 3", "--schedule linear", "--temperature 0.1", "--n 29",
    "--choice-temperature 0", "--guidance 3", "--prior uniform", "--revisions 0", "--noise 0",
])
def test_sample_flags(flags, finished, drawn, tmp_path):
    run = copy(finished, tmp_path)
    script("sample", "--run", run, "--n", 30, *flags.split())
    assert not np.array_equal(drawn, np.load(run / "samples.npz")["x"])


# ---- the README ---------------------------------------------------------------------------------


def test_every_name_of_the_map_exists():
    names = re.findall(r"`(\w+)\.py: ([\w.]+)`", README)
    assert len(names) > 20
    for module, name in names:
        thing = sys.modules[module]
        for part in name.split("."):
            thing = getattr(thing, part)


def test_pictures():
    shown = re.findall(r"\]\(figures/([^)]+)\)", README)
    assert set(shown) == {path.name for path in (HERE / "figures").iterdir()}
    assert all((HERE / "figures" / name).stat().st_size < 150_000 for name in shown)


@pytest.mark.parametrize("module", [train_stage1, train_stage2, sample])
def test_every_flag_is_explained_and_in_a_group(module):
    parser = module.flags()
    assert all(action.help for action in parser._actions)
    assert [action.dest for action in parser._optionals._group_actions] == ["help"]


def test_every_deviation_is_marked_at_its_line():
    table = README.split("## Where it differs")[1].split("Left out on purpose")[0]
    for file in sorted(HERE.glob("*.py")):
        marks = file.read_text().count("# NOTE(differs)") if file.name != "test_smoke.py" else 0
        rows = [row for row in table.splitlines() if row[:1] == "|" and f"`{file.name}`" in row]
        assert marks == len(rows), file.name


def test_every_command_of_the_readme_parses():
    modules = {"train_stage1": train_stage1, "train_stage2": train_stage2, "sample": sample}
    text = re.sub(r"```python\n.*?```", "", README, flags=re.S).replace("\\\n", " ")
    commands = re.findall(r"\b(train_stage1|train_stage2|sample)\.py((?: +-[^&;|>\n#`)]*)?)", text)
    assert {name for name, _ in commands} == set(modules)
    assert sum(bool(flags.strip()) for _, flags in commands) >= 15
    for name, flags in commands:
        flags = re.sub(r"\$\w+", "1", flags.replace("$SSL", "none"))
        modules[name].flags().parse_args(shlex.split(flags))


SNIPPETS = re.findall(r"```python\n(from (\w+) import .*?)```", README, re.S)


@pytest.mark.parametrize("code, module", SNIPPETS, ids=[name for _, name in SNIPPETS])
def test_each_file_works_alone_in_an_empty_folder(code, module, tmp_path):
    shutil.copy(HERE / f"{module}.py", tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {name for _, name in SNIPPETS} >= {"vqvae", "ssl_losses", "maskgit", "data"}
