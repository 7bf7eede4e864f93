"""Identities, known values, bad input, and the three scripts themselves: pytest -q test_smoke.py

Scripts run on the CPU, as bits are compared. Tests of real UCR files (in UCR_DATA, else in
../shared/data) and of small odd ones (UCR_CASES, ../shared/cases) skip where these are absent.
"""

import copy
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
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
PAGES = [(HERE / place / "README.md").read_text() for place in ("", "results")]
UCR = Path(os.environ.get("UCR_DATA", HERE.parent / "shared" / "data"))
CASES = Path(os.environ.get("UCR_CASES", HERE.parent / "shared" / "cases"))


@pytest.fixture(autouse=True)
def seeded_and_offline(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(data, "MIRRORS", ())


def script(name, *flags):
    """Run a script in this process under these flags, and return its globals."""
    argv, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [f"{name}.py", *map(str, flags), "--device", "cpu"]
    try:
        return runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    except SystemExit as stop:
        if stop.code is not None:
            raise
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)


def refused(capsys, message, name, *flags, code=1):
    """Assert that the script ends with this exit code and one line with this message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script(name, *flags)
    said = stop.value.code
    if code == 2:  # argparse's own line, under the usage
        assert said == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(rf"{name}\.py: .*(?:{message}).*", said), said


def watched(monkeypatch, owner, name):
    """The calls of owner.name from now on, as (arguments, result)."""
    calls, function = [], getattr(owner, name)

    def watch(*args, **kwargs):
        calls.append((args, function(*args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, watch)
    return calls


def there(path):
    return path if path.exists() else pytest.skip(f"{path} is not there")


def arrays(folder, x_train, x_test, **labels):
    """own.npz of these arrays."""
    np.savez(folder / "own.npz", x_train=x_train, x_test=x_test, **labels)
    return str(folder / "own.npz")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """An .npz of 40 + 24 short series in three classes."""
    rng, y = np.random.default_rng(1), np.arange(64) % 3
    x = np.sin(np.linspace(0, 6, 32) * (y[:, None] + 1)) + 0.1 * rng.normal(size=(64, 32))
    return arrays(tmp_path_factory.mktemp("data"), x[:40], x[40:], y_train=y[:40], y_test=y[40:])


TINY1 = ("--steps", 4, "--batch-size", 16, "--proj-dim", 64)
TINY2 = ("--steps", 4, "--batch-size", 16)
SAVE = ("--save-every", 3)
LONG = ("--steps", 15, *SAVE)
FILES = {"stage1.pt", "stage1.jsonl", "reconstructions.png", "stage2.pt", "stage2.jsonl",
         "metrics.json", "samples.npz", "samples.png"}


def train(dataset, run, flags1=(), flags2=()):
    """Both stages with tiny settings but for these flags."""
    script("train_stage1", "--dataset", dataset, "--run", run, *TINY1, *flags1)
    script("train_stage2", "--run", run, *TINY2, *flags2)
    return run


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """A run folder with both stages trained on `small`."""
    return train(small, tmp_path_factory.mktemp("finished") / "run")


def weights(path):
    return [*torch.load(path, weights_only=True)["model"].values()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(v, w) for v, w in zip(a, b))


def read_metrics(run):
    """metrics.json, which must be valid JSON: no NaN or Infinity."""
    return json.loads((run / "metrics.json").read_text(), parse_constant=pytest.fail)


def samples(run, name="samples"):
    with np.load(run / f"{name}.npz") as file:
        return dict(file)


# ---- vqvae.py -----------------------------------------------------------------------------------


def test_stft_round_trip():
    for L in range(8, 301):
        x = torch.randn(2, 3, L)
        u = vqvae.stft(x)
        assert u.shape == (2, 6, 5, L // 2 + 1)
        assert torch.allclose(vqvae.istft(u, L), x, atol=1e-5), L
    u, window = torch.randn(2, 2, 9, 40), torch.hann_window(16)  # of no series
    real, imaginary = u.unbind(1)
    x = torch.istft(torch.complex(real, imaginary), 16, 4, window=window, length=150)
    assert torch.allclose(vqvae.istft(u, 150, n_fft=16, hop=4)[:, 0], x, atol=1e-6)


@pytest.mark.parametrize("L, columns", [(8, 8), (24, 8), (26, 4), (140, 8), (128, 32), (500, 3),
                                        (1024, 8)])
def test_shapes_the_plain_autoencoder_and_eval(L, columns):
    model, x = vqvae.VQVAE(L, C=2, K=8, columns=columns), torch.randn(3, 2, L)
    twin, (H, W) = copy.deepcopy(model), model.grid
    # every column begins inside the series
    assert H == 5 and columns / 1.7 <= W <= columns * 1.5 and (W - 1) * model.stride - 1 < L
    torch.manual_seed(1)
    x_hat, u_hat, s, commitment = model(x)
    torch.manual_seed(1)
    z_q, *rest = twin.quantizer(twin.encoder(twin.stft(x)))
    assert same((x_hat, u_hat, s, commitment), (*twin.decode(z_q), *rest))
    assert z_q.shape == (3, 64, H, W) and s.shape == (3, H * W) and x_hat.shape == x.shape
    assert u_hat.shape == model.stft(x).shape
    model.quantizer.counts[0] = 0  # unused, but not revived in eval mode
    before = copy.deepcopy(model.eval().state_dict())
    x_hat, _, s, _ = model(10 * x)
    assert torch.equal(model.tokenize(10 * x), s)
    assert torch.allclose(model.detokenize(s), x_hat, atol=1e-4)
    assert same([*model.state_dict().values()], [*before.values()])


def test_quantizer_by_hand():
    quantizer, z = vqvae.VectorQuantizer(K=4, D=3), torch.randn(2, 3, 5, 2, requires_grad=True)
    quantizer(torch.randn(2, 3, 5, 2))  # places the codes
    z_q, s, commitment = quantizer.eval()(z)
    w, nearest = torch.randn_like(z), quantizer.codebook[s].transpose(1, 2).reshape(z.shape)
    assert s.shape == (2, 10) and torch.allclose(z_q, nearest, atol=1e-6)
    # z_q passes its gradient on to z; the commitment loss pulls z to the nearest code
    assert torch.equal(torch.autograd.grad((z_q * w).sum(), z)[0], w)
    gradient = torch.autograd.grad(commitment, z)[0]
    assert torch.allclose(gradient, 2 * (z - nearest) / z.numel(), atol=1e-6)
    # one step of the moving averages
    quantizer = vqvae.VectorQuantizer(K=2, D=1, decay=0.9)
    quantizer.counts[:] = torch.tensor([10.0, 10.0])
    quantizer.sums[:], quantizer.codebook[1] = torch.tensor([[0.0], [10.0]]), 1.0
    _, s, commitment = quantizer(torch.tensor([0.2, 0.4, 0.9, 1.3]).view(1, 1, 2, 2))
    assert s.tolist() == [[0, 0, 1, 1]]
    assert commitment.item() == pytest.approx((0.04 + 0.16 + 0.01 + 0.09) / 4)
    assert torch.allclose(quantizer.counts, torch.tensor([9.2, 9.2]))
    assert torch.allclose(quantizer.sums, torch.tensor([[0.06], [9.22]]))
    assert torch.allclose(quantizer.codebook, torch.tensor([[0.06 / 9.2], [9.22 / 9.2]]))
    assert vqvae.perplexity(torch.tensor([5.0, 5, 5, 5, 0])).item() == pytest.approx(4)
    # revival leaves used codes, and lasts
    quantizer, latents = vqvae.VectorQuantizer(K=3, D=2), torch.randn(60, 2)
    quantizer.revive(latents)  # the first batch places every code
    assert (quantizer.codebook[:, None] == latents).all(2).any(1).all()
    quantizer.counts[:] = torch.tensor([30.0, 0.1, 0.3])  # below and above 1 % of 20
    quantizer.sums[:] = quantizer.codebook * quantizer.counts[:, None]
    used = quantizer.codebook[[0, 2]].clone()
    quantizer.codebook[1] = 99.0
    quantizer.revive(latents)
    revived = quantizer.codebook[1].clone()
    assert (latents == revived).all(1).any()
    assert torch.equal(quantizer.counts, torch.tensor([30, 20, 0.3]))
    assert torch.equal(quantizer.codebook[[0, 2]], used)
    quantizer.update(latents, torch.zeros(60, dtype=torch.long))  # nothing chooses code 1
    quantizer.revive(latents)
    assert torch.allclose(quantizer.codebook[1], revived)


def test_noise_is_white_and_of_the_deviation_that_reconstructions_lack():
    deviation = torch.tensor([0.5, 3.0])
    x = deviation[:, None] * torch.randn(300, 2, 256)
    model = vqvae.VQVAE(256, C=2, K=3).eval()
    model.quantizer.codebook[:] = model.encode(x[:3])[:, :, 2, 4]
    model.quantizer.codebook[2] = 1e6  # nothing chooses it, so it has the median of its row
    for parameter in model.decoder[-1].parameters():
        parameter.data.zero_()  # x^ = 0 lacks all of x
    model.fit_noise_floor(x)
    assert torch.allclose(model.noise_floor[..., 2], deviation[:, None].expand(2, 5), rtol=0.03)
    spiked = x.clone()
    spiked[0, :, 100] = 1e4  # stays in one code a bin
    model.fit_noise_floor(spiked)
    assert torch.allclose(model.noise_floor[..., 2], deviation[:, None].expand(2, 5), rtol=0.03)
    model.decoder[-1].reset_parameters()
    model.fit_noise_floor(1e-4 * x)  # x^ has more power than x
    assert (model.noise_floor == 0).all() and (model.noise(model.tokenize(x)) == 0).all()
    # in each column of the least deviation of its bins
    for model in (model, vqvae.VQVAE(140, C=2, K=3), vqvae.VQVAE(25, C=2, K=3)):
        model.noise_floor[:] = torch.rand(2, 5, 3) + 0.1
        (H, W), s = model.grid, torch.randint(3, (1, math.prod(model.grid)))
        least = [[min(model.noise_floor[c, h, s[0, h * W + w]].item() for h in range(H))
                  for w in range(W)] for c in range(2)]
        column = (np.arange(model.L) + 0.5) / model.stride - 0.5
        expected = [np.interp(column, range(W), row) for row in least]
        assert np.allclose(model.noise(s.expand(4000, -1)).std(0), expected, rtol=0.06)


def test_noise_is_measured_in_the_columns_of_the_tokens():
    model = vqvae.VQVAE(140, D=2, K=2).eval()  # 71 frames, 8 columns of 8 and a rest of 7
    model.encoder = torch.nn.LPPool2d(2, (1, 8))  # z is the root of each column's own power
    model.quantizer.codebook[1] = 1.0
    for parameter in model.decoder[-1].parameters():
        parameter.data.zero_()  # x^ = 0
    x = 3 * torch.randn(400, 1, 140)
    x[..., :68] = 0  # also in the first frame of column 4, and partly in the next three
    assert torch.equal(model.tokenize(x).view(400, 5, 8), (torch.arange(8) >= 4).expand(400, 5, 8))
    model.fit_noise_floor(x, rare=0)
    squares = torch.hann_window(8).square() / 3  # of sum 1
    column_4 = (4 + sum(squares[-n:].sum() for n in (2, 4, 6))) / 8
    assert (model.noise_floor[..., 0] == 0).all()
    assert torch.allclose(model.noise_floor[..., 1], 3 * ((column_4 + 3) / 4).sqrt(), rtol=0.03)


# ---- ssl_losses.py ------------------------------------------------------------------------------

LOSSES = {name: getattr(ssl_losses, name) for name in ("barlow_twins", "vicreg", "vbcreg")}
SSL = train_stage1.SSL_LOSSES
K = 6  # codes of the priors below, and the id of [MASK]
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # which Windows lacks


def loss_by_matrices(name, Z1, Z2):
    """The loss as printed, with its F x F matrices."""
    (B, n), centred = Z1.shape, [Z - Z.mean(0) for Z in (Z1, Z2)]
    U, V = (Z / Z.square().sum(0).sqrt() for Z in centred)
    off = 1 - torch.eye(n, dtype=Z1.dtype)
    if name == "barlow_twins":
        C = U.T @ V
        return ((1 - C.diagonal()) ** 2).sum() / n + 0.005 * (off * C**2).sum() / n
    loss = 25 * ((Z1 - Z2) ** 2).sum() / (B * n)
    for Z, normed in zip(centred, (U, V)):
        covariance, correlation = Z.T @ Z / (B - 1), normed.T @ normed
        loss = loss + 25 * torch.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).sum() / n
        loss = loss + ((off * covariance**2).sum() / n if name == "vicreg"
                       else 100 * (off * correlation**2).sum() / n**2)
    return loss


@pytest.mark.parametrize("B, n", [(4, 7), (9, 5)])  # with the shortcut for B < F, and without
@pytest.mark.parametrize("name", LOSSES)
def test_ssl_loss_and_gradient(name, B, n):
    Z1 = (torch.randn(B, n).double() @ torch.randn(n, n).double() / 2).requires_grad_()
    Z2 = (Z1.detach() + 0.3 * torch.randn(B, n, dtype=torch.float64)).requires_grad_()
    loss, expected = sum(LOSSES[name](Z1, Z2).values()), loss_by_matrices(name, Z1, Z2)
    assert torch.allclose(loss, expected, rtol=1e-10)
    for a, b in zip(torch.autograd.grad(loss, (Z1, Z2)), torch.autograd.grad(expected, (Z1, Z2))):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-12)


def test_known_values_and_full_precision():
    Z = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 3 + 5  # C = I
    assert all(term.abs() < 1e-10 for term in ssl_losses.barlow_twins(Z, Z).values())
    Z = torch.randn(16, 40).cumsum(1)  # no scale of a feature matters to correlations
    a, b = (ssl_losses.decorrelation(v) for v in (Z, Z * torch.logspace(-2, 2, 40)))
    assert torch.allclose(a, b, rtol=1e-4)
    # fp32 under autocast
    Z1, Z2 = torch.randn(2, 16, 64)
    layer, quantizer = ssl_losses.IterNorm(64), vqvae.VectorQuantizer(K=8, D=4)
    quantizer.codebook.normal_()
    for f in (*LOSSES.values(), lambda Z, _: {"": layer(Z)},
              lambda Z, _: {"": quantizer.distances(Z.view(16, 4, 4, 4))}):
        with torch.autocast("cpu", torch.bfloat16):
            inside, halved = f(Z1, Z2), f(Z1.bfloat16(), Z2.bfloat16())
        rounded = f(Z1.bfloat16().float(), Z2.bfloat16().float())
        assert same([*inside.values()], [*f(Z1, Z2).values()])
        assert same([*halved.values()], [*rounded.values()])
    for f in LOSSES.values():
        assert same([*f(Z2=Z2, Z1=Z1).values()], [*f(Z1, Z2).values()])
        dead = (Z1 * (torch.arange(64) > 0)).requires_grad_()  # one feature has no variance
        assert torch.autograd.grad(sum(f(dead, Z2).values()), dead)[0].isfinite().all()
    twins, z = (vqvae.VectorQuantizer(8, 4), vqvae.VectorQuantizer(8, 4)), torch.randn(9, 4, 5, 2)
    for twin, is_inside in zip(twins, (False, True)):  # the averages, too
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_inside):
            twin(z)
    assert same(*([*twin.state_dict().values()] for twin in twins))


def test_iternorm():
    Z = torch.randn(4000, 8) @ (torch.eye(8) + 0.15 * torch.randn(8, 8)) + 3
    layer = ssl_losses.IterNorm(8, group_size=8, T=7, momentum=1.0)
    out = layer(Z)
    assert out.mean(0).abs().max() < 1e-4 and (out.T.cov() - torch.eye(8)).abs().max() < 0.02
    fresh = ssl_losses.IterNorm(8, group_size=8).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.allclose(fresh(Z[:1]), out[:1], atol=1e-4)  # of no batch, in eval mode
    few = torch.randn(4, 64, requires_grad=True)  # rows than features
    ssl_losses.IterNorm(64)(few).square().sum().backward()
    assert few.grad.isfinite().all()
    Z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ssl_losses.IterNorm(4, group_size=2).double(), Z)
    Z, identity = torch.randn(20, 128, dtype=torch.float64), torch.eye(64, dtype=torch.float64)
    layer = ssl_losses.IterNorm(128).double()
    for U, out in zip((Z - Z.mean(0)).split(64, 1), layer(Z).split(64, 1)):
        S, P = U.T @ U / 20 + 1e-5 * identity, identity
        for _ in range(5):
            P = (3 * P - P @ P @ P @ S / S.trace()) / 2
        assert torch.allclose(out, U @ P / S.trace().sqrt(), rtol=1e-8)
    assert torch.allclose(layer.running_mean.flatten(), 0.1 * Z.mean(0))
    widths = [W.shape for W in ssl_losses.projector(8, 64).parameters() if W.ndim == 2]
    assert widths == [(64, 8), (64, 64), (64, 64)]


# ---- maskgit.py ---------------------------------------------------------------------------------


def sure_of(s):
    """A logits_fn to which the tokens s (B,N) are the only possible ones."""
    logits = torch.full((*s.shape, K), -math.inf).scatter(2, s[..., None], 0.0)
    return lambda s_M: logits


@pytest.mark.parametrize("schedule, share", [("cosine", 2 / math.pi), ("linear", 0.5)])
def test_masked_share_and_loss_of_masked_tokens_only(schedule, share):
    is_masked = maskgit.mask_tokens(torch.zeros(20000, 256, dtype=torch.long), schedule)
    assert is_masked.float().mean().item() == pytest.approx(share, abs=0.01)
    assert is_masked.sum(1).min() >= 1 and is_masked.float().mean(0).std() < 0.01
    logits, s, is_masked = torch.randn(3, 10, 5), torch.randint(5, (3, 10)), is_masked[:3, :10]
    loss = maskgit.masked_cross_entropy(logits, s, is_masked)
    other = logits + 100 * torch.randn_like(logits) * ~is_masked[..., None]
    assert torch.equal(loss, maskgit.masked_cross_entropy(other, s, is_masked))
    assert torch.allclose(loss, F.cross_entropy(logits[is_masked], s[is_masked]))


@pytest.mark.parametrize("T", [8, 50])
def test_decoding_follows_the_schedule_and_keeps_what_is_known(T):
    s_M = torch.randint(K, (9, 40)).masked_fill(torch.rand(9, 40) < 0.7, K)
    s_M[0], s_M[1], canvases = K, 2, []  # all to do, and nothing
    logits_fn = lambda s_M: canvases.append(s_M) or torch.randn(9, 40, K)
    canvases.append(maskgit.decode(logits_fn, s_M, K, n_steps=T))
    n = left = (s_M == K).sum(1)
    assert len(canvases) == T + 1 and torch.equal(canvases[0], s_M) and canvases[-1].max() < K
    for t in range(1, T + 1):
        gamma = math.cos(math.pi / 2 * t / T)
        left = (gamma * n).floor().minimum(left - 1).clamp_min(0)  # at least one is settled
        assert torch.equal((canvases[t] == K).sum(1), left.long())
        was_known = canvases[t - 1] != K
        assert torch.equal(canvases[t][was_known], canvases[t - 1][was_known])


def test_draws_have_their_probability_and_the_noise_of_their_scores_fades(monkeypatch):
    p = torch.tensor([0.1, 0.2, 0.7])
    share = maskgit.draw(p.log().expand(1, 20000, 3), 2.0)[0].bincount() / 20000
    assert torch.allclose(share, p.sqrt() / p.sqrt().sum(), atol=0.02)
    calls = watched(monkeypatch, maskgit, "lowest")
    maskgit.decode(partial(sample.uniform, K), torch.full((400, 40), K), K, n_steps=8)
    for t, ((score, _), _) in enumerate(calls, 1):  # Gumbel noise has deviation pi / sqrt(6)
        expected = 4.5 * (1 - t / 8) * math.pi / 6**0.5
        assert score[score.isfinite()].std().item() == pytest.approx(expected, rel=0.1, abs=1e-5)


def test_revising_redraws_a_falling_share_and_what_is_improbable():
    R, seen, s, is_given = 5, [], torch.randint(K, (4, 40)), torch.rand(4, 40) < 0.3
    logits_fn = lambda s_M: seen.append(s_M) or torch.randn(4, 40, K)
    revised = maskgit.revise(logits_fn, s, is_given, K, n_rounds=R, share=0.4)
    assert len(seen) == R  # one pass a round
    for i, canvas in enumerate(seen):
        expected = np.round(0.4 * (1 - i / R) * (~is_given).sum(1).numpy())
        assert np.array_equal((canvas == K).sum(1), expected)
        assert torch.equal(canvas[is_given], s[is_given])
    assert torch.equal(revised[is_given], s[is_given]) and (revised != s).any()
    assert torch.equal(maskgit.revise(sure_of(s), s, is_given, K), s)
    target, seen, none_given = s.clone(), [], torch.zeros_like(is_given)
    s[:, :10] = (s[:, :10] + 1) % K
    # of 40, the first round masks 20 at random, the second the 10 least probable
    logits_fn = lambda s_M: seen.append(s_M) or sure_of(target)(s_M)
    revised = maskgit.revise(logits_fn, s, none_given, K, n_rounds=2, share=0.5)
    is_wrong = (seen[0] != K) & (s != target)
    assert is_wrong.any() and (seen[1][is_wrong] == K).all() and torch.equal(revised, target)
    s, seen, logits = torch.zeros(9, 10, dtype=torch.long), [], torch.zeros(9, 10, K)
    logits[:, 5:] = torch.tensor([0.3, 0.7, 0, 0, 0, 0]).log()  # margin -.59, of the others 0
    logits_fn = lambda s_M: seen.append(s_M) or logits
    maskgit.revise(logits_fn, s, s > 0, K, n_rounds=2, share=0.2, choice_temperature=0.0)
    assert (seen[1] == K).sum(1).eq(1).all() and not (seen[1] == K)[:, :5].any()


def test_guidance_labels_and_priors_that_are_sure_or_know_nothing(monkeypatch):
    prior = maskgit.MaskGIT(6, 8, n_classes=3, width=16, n_layers=1, label_dropout=1.0)
    s_M, y = torch.full((4, 8), 6), torch.tensor([0, 1, 2, 0])
    assert torch.equal(prior(s_M, y), prior(s_M))  # labels are hidden in training only
    l_class, l_null = prior.eval()(s_M, y), prior(s_M)
    assert not torch.allclose(l_class[0], l_class[1])
    for scale in (0.0, 1.0, 2.0):
        expected = l_null + scale * (l_class - l_null)
        assert torch.allclose(maskgit.guided(prior, y, scale)(s_M), expected, atol=1e-5)
    for has_bf16, attention in ((False, maskgit.ATTENTION), (True, maskgit.ATTENTION[:2])):
        monkeypatch.setattr(maskgit, "HAS_BF16", has_bf16)
        monkeypatch.setattr(maskgit, "ATTENTION", attention)
        assert torch.allclose(prior(s_M, y), l_class, rtol=0.02, atol=0.002)
    s, s_M, logits = torch.randint(K, (3, 20)), torch.full((3, 20), K), torch.randn(3, 20, K)
    assert torch.equal(maskgit.decode(sure_of(s), s_M, K), s)
    logits_fn, seen = lambda s_M: seen.append(s_M) or logits, []
    likeliest = maskgit.decode(logits_fn, s_M, K, temperature=0.0, choice_temperature=0.0)
    assert torch.equal(likeliest, logits.argmax(2))
    log_p = logits.log_softmax(2).amax(2)  # the surest are settled first
    assert all(log_p[i][s == K].max() < log_p[i][s < K].min() for s_M in seen[1:]
               for i, s in enumerate(s_M))
    assert (maskgit.nll_bound(sure_of(s), s, K) == 0).all()
    bound = maskgit.nll_bound(lambda s_M: 0 * logits, s, K)  # of a uniform prior
    assert torch.allclose(bound, torch.full((3,), 20 * math.log(K)))
    bare, s_M = maskgit.MaskGIT(6, 8, width=16, n_layers=0), torch.randint(7, (2, 8))
    h = F.layer_norm(bare.tokens(s_M) + bare.positions[1:], (16,))
    assert torch.allclose(bare(s_M), h @ bare.tokens.weight[:6].T, rtol=0.02, atol=0.002)


def test_the_bound_masks_any_number_and_knows_the_label():
    seen, s = [], torch.zeros(6000, 3, dtype=torch.long)
    maskgit.nll_bound(lambda s_M: seen.append(s_M) or sample.uniform(K, s_M), s, K)
    share = (seen[0] == K).sum(1).bincount(minlength=4) / 6000
    assert torch.allclose(share, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]), atol=0.03)
    # a prior that is sure of code 0 where the label is 1, and knows nothing of others
    prior = lambda s_M, y=None: 1e9 * F.one_hot(torch.zeros_like(s_M), K) * y[:, None, None]
    prior.mask_id, y = K, (torch.arange(12) >= 3).long()
    nats, error = train_stage2.bound(prior, s[:12], y)
    of_a_row = 3 * math.log(K) * (1.0 - y)
    assert nats == pytest.approx(of_a_row.mean().item())
    assert error == pytest.approx(of_a_row.std(correction=0).item() / 12**0.5)


# ---- data.py ------------------------------------------------------------------------------------


def test_synthetic_set_is_like_the_real_one():
    d = data.load("synthetic")
    assert d.x_train.shape == (1000, 1, 128) and len(d.x_test) == 4000 and d.classes == [*"1234"]
    assert ((d.x_train * d.std + d.mean).std(2) - 1).abs().max() < 1e-4
    x = torch.cat([d.x_train, d.x_test])[:, 0]
    ok, label, *ours = sample.fit_two_patterns(x).T
    assert ok.all() and torch.equal(label, torch.cat([d.y_train, d.y_test]))
    assert [(v.min(), v.max()) for v in ours[1::2]] == [(16, 32)] * 2  # both lengths
    d = data.load("TwoPatterns", there(UCR / "TwoPatterns"))
    x_real = torch.cat([d.x_train, d.x_test])[:, 0]
    for lag in (1, 2, 4, 8, 16, 32):
        a, b = ((v[:, lag:] * v[:, :-lag]).mean().item() for v in (x, x_real))
        assert a == pytest.approx(b, abs=0.02), lag
    ok, _, *theirs = sample.fit_two_patterns(x_real).T
    assert ok.all() and all(sample.ks_distance(a, b) < 0.05 for a, b in zip(ours, theirs))


def test_augmentations_and_shift():
    x, line = torch.randn(64, 2, 50), torch.linspace(0, 1, 50).expand(64, 2, 50)
    assert torch.allclose(data.window_warp(x, slowest=1.0, fastest=1.0), x, atol=1e-4)
    warped = data.window_warp(line)
    assert warped[..., 0].max() < 1e-5 and warped[..., -1].min() > 1 - 1e-5
    assert (warped.diff() > 0).all() and not torch.allclose(warped, line, atol=0.02)
    assert torch.equal(warped[:, 0], warped[:, 1]) and len(warped.unique(dim=0)) == 64
    slope = 49 * warped.diff()  # at speed v: .6 v + .4 in the window, .6 + .4 / v outside
    for value, expected in ((slope.amin(), 0.8), (slope.amax(2).min(), 1), (slope.amax(), 1.6)):
        assert value.item() == pytest.approx(expected, abs=0.06)
    ratio = data.amplitude_resize(x) / x
    assert torch.allclose(ratio, ratio[:, :1, :1].expand_as(x), rtol=1e-3)
    assert ratio.mean().item() == pytest.approx(1, abs=0.08)
    assert ratio[:, 0, 0].std().item() == pytest.approx(0.2, abs=0.05)
    shuffled = data.slice_and_shuffle(torch.arange(50.0).expand(64, 2, 50))
    assert torch.equal(shuffled.sort(2).values, torch.arange(50.0).expand(64, 2, 50))
    assert (shuffled.diff() != 1).sum(2).max() == 3  # joints
    assert (data.gaussian_noise(x) - x).std(0).mean().item() == pytest.approx(0.05, abs=0.005)
    torch.manual_seed(1)
    view = data.augment(x, ["gaussian_noise", "amplitude_resize"])
    torch.manual_seed(1)
    assert torch.equal(view, data.amplitude_resize(data.gaussian_noise(x)))
    for dtype in (torch.float64, torch.bfloat16):
        assert data.augment(x.to(dtype), data.AUGMENTATIONS).dtype == dtype
    x = torch.arange(5).expand(5, 2, 5)
    moved = data.time_shift(x, torch.arange(-2, 3)[:, None])
    assert torch.equal(moved[:, 0], moved[:, 1]) and torch.equal(data.time_shift(x, 1)[3], moved[3])
    assert moved[:, 0].tolist() == [
        [0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 2, 3, 4, 4], [2, 3, 4, 4, 4]]


READ = {  # name in CASES: classes
    "tsv_empty_field_one_a_row": "1 2", "tsv_empty_tail_one_short_row": "1 2",
    "ts_percent_comment": "a b", "ts_serieslength_of_unequal": "a b",
    "ts_class_names_optional": "a b", "ts_unlabelled_trailing_colon": "",
    "ts_labels_1_and_1.0": "1 2", "object_extra.npz": "none walk", "labels_bytes.npz": "none walk"}
REFUSED = {  # name in CASES: what is said, after the place
    "tsv_label_with_space": "'slow walk'", "tsv_label_with_space_and_number": "'Class 1'",
    "tsv_pandas_header": "'label'", "tsv_labels_underscore": "'1_1'", "tsv_label_hash": "'#1'",
    "tsv_labels_beyond_2p53": "9007199254740992", "ts_class_labels_key": "no '@classLabel true'",
    "ts_timestamps": "time stamps", "ts_targetlabel": "regression", "length_last_1.npz": "needs 8"}


@pytest.mark.parametrize("case", [*READ, *REFUSED])
def test_cases(case):
    path = there(CASES / ("npz" if case.endswith("npz") else "") / case)
    where = ("Own", path) if path.is_dir() else (str(path),)
    if case in READ:
        d = data.load(*where)
        assert d.classes == READ[case].split() and d.x_train.shape[1:] == (1, 24)
    else:
        with pytest.raises(data.Refused, match=r"(TRAIN.*line \d|\.npz).*" + REFUSED[case]):
            data.load(*where)


X, ROW = np.random.default_rng(0).normal(size=(6, 10)), "1 1 2 3 4 5 6 7 8\n"
ROWS, TS = ROW + "2" + ROW[1:], "@classLabel true a b\n@data\n1,2:a\n"


def table(folder, train, test=ROWS, ending="tsv"):
    """The set Own of these two texts, in `folder`."""
    for split, text in (("TRAIN", train), ("TEST", test)):
        (folder / f"Own_{split}.{ending}").write_bytes(text.encode("latin-1"))
    return folder


def test_tables_and_arrays_by_hand(tmp_path, capsys):
    row = " ".join(map(str, range(10)))
    short = "0 NaN 4 6 8 ? 12 14 NaN NaN"  # eight samples long, two of them missing
    d = data.load("Own", table(tmp_path, f"10.0 {row}\r\n\r\n9 {short}\r\n", f"09 {row}\n10 {row}"))
    assert d.classes == ["9", "10"] and d.y_train.tolist() == [1, 0] and d.y_test.tolist() == [0, 1]
    assert "train: 1 series resampled to 10, 1 with gaps filled" in capsys.readouterr().out
    x = [range(10)], [np.linspace(0, 14, 10)]
    assert np.allclose(d.x_train * d.std + d.mean, x, atol=1e-5)
    one, other = f"10 {row}\n", f"9 {row}\n"  # a row moved from one split to the other
    digest = data.load("Own", table(tmp_path, one + other + one, other)).digest
    with pytest.raises(data.Refused, match="Own is not the data that stage 1 was trained on"):
        data.load("Own", table(tmp_path, one + other, one + other), expected=digest)
    text = ("# caf\xe9 in Latin-1\n@dimensions 7\n@ClassLabel True none b c\n@DATA\n"
            "1,2,3 : 4,?,6 : none\n% between\n7,8:9,10:b\n")
    series, labels = data.read_ts(table(tmp_path, text, ending="ts") / "Own_TRAIN.ts")
    assert labels == ["none", "b"] and np.array_equal(series[1], [[7, 8], [9, 10]])
    assert np.array_equal(series[0], [[1, 2, 3], [4, np.nan, 6]], equal_nan=True)
    x = np.random.default_rng(0).normal(size=(12, 3, 16)) * [[1], [10], [0]] + [[0], [1.7e9], [5]]
    d = data.load(arrays(tmp_path, x, x[:5]))
    assert d.x_train.shape == (12, 3, 16) and d.y_train is None and d.classes == []
    assert torch.allclose(d.x_train.std((0, 2), correction=0), torch.tensor([1.0, 1, 0]), atol=1e-4)
    assert np.allclose(d.x_test * d.std + d.mean, x[:5], rtol=0, atol=1e-5)  # an offset survives
    d = data.load(arrays(tmp_path, np.full((7, 16), 1e25 / 3), x[:1, 0]))  # whose mean is rounded
    assert d.x_train.eq(0).all() and d.mean == 1e25 / 3 and d.std == 1
    assert data.load(arrays(tmp_path, X[:, :8], X)).x_test.shape == (6, 1, 8)  # training's length
    assert data.trim(np.array([[1, 2, np.nan], [1, np.nan, np.nan]])).shape == (2, 2)
    last = X[:, None].repeat(30, 1) * 1e39  # (6,30,10), beyond fp32
    assert data.load(arrays(tmp_path, last, last)).x_train.abs().max() < 5
    assert "30 channels of 10 samples; if it is (N,L,C)" in capsys.readouterr().out


@pytest.mark.parametrize("train, message", [  # a table, a .ts, or arrays
    ("", "TRAIN.tsv: the file is empty"),
    ("1\t\0 2", "TRAIN.tsv: the file is empty, or not text in UTF-8"),
    (ROW + "\n2 1 2 3\n", "TRAIN.tsv, line 3: 4 fields, expected 9 as in the first row"),
    (ROW + "?" + ROW[1:], "line 2: the label is missing"),
    (ROW, "Own: 1 training, 2 test series; add some, as it needs 2 and 1"),
    ("7" + ROW[1:] + "8" + ROW[1:], r"test labels \['1', '2'\] do not occur .* \['7', '8'\]"),
    (TS.replace("@data\n", ""), "TRAIN.ts: no line '@data'"),
    (TS + "1,2,3:4,5:a\n", r"line 4: channels of lengths \[3, 2\]"),
    ("@attribute a0 numeric\n" + TS, "TRAIN.ts, line 1: ARFF is not read"),
    (TS + "1,2:3,4\n", "TRAIN.ts, line 4: '3,4' stands where the header announces a label"),
    (TS.replace("data\n", "data "), "TRAIN.ts: no line '@data'"),
    ({"x_train": X.astype(object)}, "own.npz: not an .npz of plain arrays"),
    ({"x_test": X + [np.inf] * 10}, r"x_test\[0, 0\] is infinite"),
    ({"x_train": X.astype(int) + 2**60}, r"x_train\[0, 0\] is .* an integer of 2\^53 or more"),
    ({"y_train": X[0]}, r"y_train has shape \(10,\); expected a label for each of the 6"),
    ({"y_train": X[:, 0]}, "own.npz: labels of one split only"),
    ({"x_test": X * 1e60}, "own.npz: values beyond fp32 even when scaled"),
    ({"x_train": X * 1e200}, "own.npz: values beyond fp32"),
])
def test_data_that_are_refused(train, message, tmp_path):
    if isinstance(train, str):
        name = table(tmp_path, train, *((TS, "ts") if train[:1] == "@" else ())) and "Own"
    else:
        name = arrays(tmp_path, **{"x_train": X, "x_test": X} | train)
    with pytest.raises(data.Refused, match=message):
        data.load(name, tmp_path)


def test_download(tmp_path, monkeypatch):
    for kind, place in (("flat", ""), ("folder", "Own/"), ("up", "../")):
        with zipfile.ZipFile(tmp_path / f"Own-{kind}.zip", "w") as archive:
            for file in ("Own_TRAIN.txt", "Own_TEST.txt", "README.md"):
                archive.writestr(place + file, ROWS)
    (tmp_path / "Own-cut.zip").write_bytes((tmp_path / "Own-flat.zip").read_bytes()[:300])
    address = tmp_path.as_uri() + "/{}-"
    bad = [address + kind for kind in ("cut.zip", "up.zip", "gone.zip")]
    for kind in ("flat", "folder"):
        monkeypatch.setattr(data, "MIRRORS", bad)
        with pytest.raises(data.Refused, match="not a zip.*up.zip .*No such file"):
            data.load("Own", tmp_path / kind)
        assert not (tmp_path / kind).exists()
        monkeypatch.setattr(data, "MIRRORS", [*bad, f"{address}{kind}.zip"])
        data.load("Own", tmp_path / kind)
        assert len([*(tmp_path / kind / "Own").iterdir()]) == 2  # without the README.md
        monkeypatch.setattr(data, "MIRRORS", ())
        assert data.load("Own", tmp_path / kind).x_train.shape == (2, 1, 8)
        (tmp_path / kind / "Own" / "Own_TEST.txt").unlink()  # the other is not overwritten
        monkeypatch.setattr(data, "MIRRORS", [f"{address}{kind}.zip"])
        with pytest.raises(data.Refused, match="Own_TRAIN.txt: there, but not both"):
            data.load("Own", tmp_path / kind)
    for name in ("Own.csv", "my/Own"):  # is not asked for by that address
        with pytest.raises(data.Refused, match=f"{name}: neither an .npz nor a UCR name"):
            data.load(name, tmp_path)


def test_what_the_scripts_share(tmp_path):
    for done, rate in ((0, 0.04), (0.05, 0.52), (0.1, 1), (0.55, 0.5), (1, 0)):
        assert data.one_cycle(done) == pytest.approx(rate)
    assert data.replayed(data.one_cycle, torch.device("cpu")) is data.one_cycle
    data.report(tmp_path, "stage1", {"mse": math.inf, "knn": 0.5})
    data.report(tmp_path, "stage2", {"nats": math.nan})
    assert read_metrics(tmp_path) == {"stage1": {"mse": None, "knn": 0.5}, "stage2": {"nats": None}}
    log = [{"step": 2}]
    data.record({"loss": torch.tensor(6.0)}, log, 5, tmp_path / "log")
    assert log[1] == {"step": 5, "loss": 2}  # a mean of three steps
    # a file is written whole or not at all
    path = tmp_path / "new" / "file"
    data.write(path, b"old")
    with pytest.raises(TypeError):
        data.write(path, lambda file: file.write(b"half") and file.write("not bytes"))
    assert os.listdir(path.parent) == ["file"]
    code = ("import data, os, pathlib, sys\nos.replace = lambda *names: os.kill(os.getpid(), 9)\n"
            "data.write(pathlib.Path(sys.argv[1]), b'ne')")
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=HERE)
    assert killed.returncode == -KILL and path.read_bytes() == b"old"


# ---- the two stages -----------------------------------------------------------------------------


def loss_by_hand(model, project, x, ssl, views):
    """The formula, of its parts in the order of the method."""
    u = model.stft(x)
    z_q, s, commitment = model.quantizer(model.encoder(u))
    train_stage1.replace_tokens(model, z_q, s, 0.0)  # draws what the step draws, to no effect
    x_hat, u_hat = model.decode(z_q)
    loss = F.mse_loss(x_hat, x) + F.mse_loss(u_hat, u) + commitment
    if ssl is None:
        return loss
    x_view = data.augment(x, data.AUGMENTATIONS)
    u_view = model.stft(x_view)
    z_view = model.encoder(u_view)
    x_hat, u_hat = model.decode(z_view)
    loss = loss + 0.1 * (F.mse_loss(x_hat, x_view) + F.mse_loss(u_hat, u_view))
    if views == 2:
        z_q = model.quantizer(model.encode(data.augment(x, data.AUGMENTATIONS)))[0]
    Z, Z_view = project(z_q.mean((2, 3))), project(z_view.mean((2, 3)))
    return loss + 0.3 * sum(ssl(Z, Z_view).values())


@pytest.mark.parametrize("name, views", [
    ("none", 1), ("barlow", 1), ("vicreg", 1), ("vbcreg", 1), ("barlow", 2), ("vbcreg", 2)])
def test_the_loss_is_the_formula(name, views):
    model = vqvae.VQVAE(32, K=8).to(memory_format=torch.channels_last)  # as the script has it
    project = ssl_losses.projector(64, 64, iternorm=name == "vbcreg")
    twins, x = copy.deepcopy((model, project)), torch.randn(16, 1, 32)
    encoder = copy.deepcopy(model.encoder)
    encoder(model.stft(x))
    torch.manual_seed(1)
    loss, _, s = train_stage1.stage1_loss(model, project, x, SSL[name], 0.3, data.AUGMENTATIONS,
                                          views, token_noise=0.0)
    torch.manual_seed(1)
    expected = loss_by_hand(*twins, x, SSL[name], views)
    assert torch.equal(loss, expected) and s.shape == (16, 40)
    averages_x_alone = name == "none" or views == 2
    assert same([*model.encoder.buffers()], [*encoder.buffers()]) == averages_x_alone
    (loss + expected).backward()
    for part, twin in zip((model, project) if SSL[name] else (model,), twins):
        for p, q in zip(part.parameters(), twin.parameters()):  # the gradient reaches all
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5)


def test_token_noise():
    model, s = vqvae.VQVAE(32, K=8), torch.randint(8, (2000, 40))
    model.quantizer.codebook.normal_()
    z_q = model.quantizer.lookup(s, model.grid).requires_grad_()
    assert torch.equal(train_stage1.replace_tokens(model, z_q, s, 0.0), z_q)
    noisy = train_stage1.replace_tokens(model, z_q, s, 0.4)
    noisy.sum().backward()
    is_replaced = (z_q.grad == 0).all(1)  # no gradient there, elsewhere all of it
    assert torch.equal(z_q.grad, (~is_replaced)[:, None].expand_as(z_q).float())
    share = is_replaced.float().mean((1, 2))  # p is uniform in 0..0.4 for each row of 40 draws
    assert share.mean().item() == pytest.approx(0.2, abs=0.01)
    assert share.var().item() == pytest.approx(0.16 / 12 + (0.2 - 0.16 / 3) / 40, rel=0.1)


def test_probes_and_metrics_by_hand():
    far = torch.tensor([[0.0], [0], [1], [1], [1]])  # five neighbours vote
    assert train_stage1.nearest_neighbours(far, far[:, 0].long(), far[:1]).item() == 1
    # the margin of +1 and -3 is at -1
    Y, y, between = torch.tensor([[1.0], [-3.0]]), torch.tensor([1, 0]), torch.tensor([-1.3, -0.7])
    assert train_stage1.linear_probe(Y, y, between[:, None], penalty=1e4).tolist() == [0, 1]
    a = torch.randn(5000, 3, dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T  # exactly N(0, I)
    b = a * torch.tensor([2.0, 1, 3]) + torch.tensor([1.0, 0, 0])
    # |mu|^2 + sum (sigma_a - sigma_b)^2
    assert sample.frechet_distance(a, b) == pytest.approx(1 + 1 + 0 + 4, abs=1e-6)
    y = torch.tensor([0, 0, 0, 1])
    rows = sample.rows_in_shares_of(torch.tensor([1, 0]), y, 3)  # weights 1/6 1/6 1/6 1/2
    assert rows.tolist() == [0, 2, 3, 3]
    assert sample.rows_in_shares_of(y.repeat(9), y, 3).tolist() == [0, 1, 2, 3]
    assert sample.rows_in_shares_of(y[3:] + 1, y, 3).amax() < 4  # of a class that y lacks: any
    x, y = data.two_patterns(60, torch.Generator().manual_seed(0))
    half = torch.cat([x[:30], torch.randn(28, 1, 128), 0 * x[:1], math.nan * x[:1]])
    scores = sample.two_patterns_scores(x, y, half, y)
    assert scores["well_formed_reconstructed"] == 1 and scores["well_formed_generated"] == 0.5
    assert sample.two_patterns_scores(x, (y + 1) % 4, x, y)["well_formed_reconstructed"] == 0
    a, b = torch.randn(2, 40, 3, dtype=torch.float64) @ torch.randn(2, 3, 3).double()
    S_a, S_b, between = a.T.cov(), b.T.cov(), a.mean(0) - b.mean(0)  # S_a and S_b do not commute
    of_root = torch.linalg.eigvals(S_a @ S_b).real.sqrt().sum()
    expected = between.square().sum() + S_a.trace() + S_b.trace() - 2 * of_root
    assert sample.frechet_distance(a, b) == pytest.approx(expected.item())
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp()
    assert sample.inception_score(p.log()) == pytest.approx(expected.item())
    a, b = torch.tensor([1.0, 2, 3, 4]), torch.tensor([3.0, 4, 5, 6])
    assert sample.ks_distance(a, b) == sample.ks_distance(b, a) == 0.5


def fitted(n=7, n_test=5):
    """A VQ-VAE whose codes are placed, and n + n_test random series of three classes."""
    x, y, model = torch.randn(n + n_test, 1, 32), torch.arange(n + n_test) % 3, vqvae.VQVAE(32, K=8)
    model(x[:n])
    return model.eval(), data.Dataset(x[:n], y[:n], 2 * x[n:], y[n:], [*"abc"], 0, 1, "")


def test_each_figure_is_of_its_split(monkeypatch):
    (model, d), probes = fitted(), watched(monkeypatch, train_stage1, "linear_probe")
    found = train_stage1.evaluate(model, d)
    s_train, s = model.tokenize(d.x_train), model.tokenize(d.x_test)
    for name, x, tokens in (("train_mse", d.x_train, s_train), ("test_mse", d.x_test, s)):
        error = F.mse_loss(model.detokenize(tokens), x).item()
        assert found[name] == pytest.approx(error, rel=1e-4)
    assert found["codebook_usage"] == len(s.unique()) / 8
    assert found["perplexity"] == pytest.approx(vqvae.perplexity(s.flatten().bincount()).item())
    Y_train, Y = (model.quantizer.codebook[tokens].mean(1) for tokens in (s_train, s))
    low, high = Y_train.amin(0), Y_train.amax(0)
    ((features, y_train, features_test), labels), = probes
    for v, w in ((features, Y_train), (features_test, Y)):
        assert torch.allclose(v, 2 * (w - low) / (high - low) - 1, atol=1e-4)
    is_right = (labels == d.y_test).float()
    assert y_train is d.y_train and found["linear_probe"] == is_right.mean().item()
    for x, novelty in ((model.detokenize(s), 1), (d.x_train, 0)):
        found = sample.evaluate(model, d, x, None, 0.0, 1, "")
        assert found["novelty"] == pytest.approx(novelty, abs=1e-3)


def test_each_classifier_learns_its_own_series(monkeypatch):
    (_, d), taught = fitted(60, 4), watched(monkeypatch, sample, "train_fcn")
    x_rec, x_train_rec, x = (torch.randn(n, 1, 32) for n in (4, 60, 30))
    y = torch.tensor([0] * 18 + [1, 2] * 6)
    found = sample.scores(d, x_rec, x_train_rec, x, y, 2)
    (real, of_rec, of_x), pairs = (fcn for _, fcn in taught), [args for args, _ in taught]
    assert same(sum(pairs, ()), (d.x_train, d.y_train, x_train_rec, d.y_train, x, y))
    in_shares = x[sample.rows_in_shares_of(d.y_test, y, 3)]
    for name, v, fcn in (("reconstructed", x_rec, of_rec), ("generated", in_shares, of_x)):
        fid = sample.frechet_distance(real[:-1](d.x_test), real[:-1](v))
        assert found[f"fid_{name}"] == pytest.approx(fid, rel=1e-4)
        score = sample.inception_score(real(v))
        assert found[f"inception_{name}"] == pytest.approx(score, rel=1e-4)
        is_right = (fcn(d.x_test).argmax(1) == d.y_test).float()
        assert not fcn.training and found[f"cas_{name}"] == is_right.mean().item()


def test_what_is_given_is_kept_and_what_is_hidden_is_not_seen(monkeypatch, tmp_path):
    seen, s_M = [], torch.randint(K, (300, 20)).masked_fill(torch.rand(300, 20) < 0.5, K)
    nothing = lambda s_M, y=None: seen.append(s_M) or sample.uniform(K, s_M)
    s = sample.generate(nothing, K, None, s_M, 2, 1.0, 1.0, 3)
    assert torch.equal(s[s_M < K], s_M[s_M < K]) and s.max() < K
    assert len(seen) == 3 * (2 + 3) and all((canvas == K).any() for canvas in seen)
    y = torch.randint(K, (300,))  # each row by its own label
    label = lambda s_M, y=None: 1e9 * F.one_hot(y[:, None].expand_as(s_M), K).float()
    s = sample.generate(label, K, y, torch.full((300, 4), K), 2, 1.0, 1.0, 1)
    assert torch.equal(s, y[:, None].expand(-1, 4))
    (model, d), drawn = fitted(), watched(monkeypatch, sample, "generate")
    flags = sample.flags().parse_args
    for stretch, columns in (("10:20", [2, 3, 4, 5]), ("31:32", [7]), ("3:4", [1])):
        args = flags(["--impute", stretch, *"--n 5 --steps 1 --rounds 1 --noise 0".split()])
        for added in (0, 7):
            d.x_test[..., slice(*args.impute)] += added
            sample.impute(tmp_path, model, partial(sample.uniform, 8), d, args)
        before, s_M = (arguments[3] for arguments, _ in drawn[-2:])
        of_a_series = s_M.view(5, 10, *model.grid)
        assert torch.equal(s_M, before) and (of_a_series == of_a_series[:, :1]).all()
        is_touched = torch.isin(torch.arange(8), torch.tensor(columns))
        assert torch.equal(of_a_series == 8, is_touched.expand_as(of_a_series))


def test_muon():
    """By singular values, and as torch's, which multiplies in bfloat16."""
    G = torch.randn(2, 6, 4, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    S = S / S.norm(dim=1, keepdim=True)
    for _ in range(5):
        S = 3.4445 * S - 4.775 * S**3 + 2.0315 * S**5
    assert torch.allclose(train_stage2.orthogonal(G), (U * S[:, None]) @ Vh)
    begin = [torch.randn(shape) for shape in ((6, 4), (4, 4), (6, 4))]
    ours, torchs = ([W.clone().requires_grad_() for W in begin] for _ in range(2))
    optimizers = (train_stage2.Muon(ours, torch.tensor(0.1)),
                  torch.optim.Muon(torchs, 0.1, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        for W, V in zip(ours, torchs):
            W.grad = V.grad = torch.randn_like(W)
        for optimizer in optimizers:
            optimizer.step()
    for W, V, old in zip(ours, torchs, begin):
        assert (W - V).norm() < 0.03 * (W - old).norm()


@pytest.mark.parametrize("name", SSL)
def test_a_step_of_each_stage_and_decoding_stay_on_their_device(name):
    """On the meta device, where a tensor made elsewhere, or a look at a value, raises."""
    model, x = vqvae.VQVAE(32, C=2).to("meta"), torch.empty(16, 2, 32, device="meta")
    project = ssl_losses.projector(64, 64, iternorm=name == "vbcreg").to("meta")
    loss, terms, s = train_stage1.stage1_loss(model, project, x, SSL[name], 0.1,
                                              data.AUGMENTATIONS, views=2, token_noise=0.1)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([*model.parameters(), *project.parameters()], 1.0)
    assert all(value.is_meta for value in (loss, norm, *terms.values()))
    model.eval().fit_noise_floor(data.time_shift(x, s[:, :1]))
    assert model.noise_floor.is_meta and sample.to_series(model, s, 1.0).is_meta
    prior, is_masked = maskgit.MaskGIT(32, 40, 3, 16, 1, 2).to("meta"), maskgit.mask_tokens(s)
    logits = prior(s.masked_fill(is_masked, 32), s[:, 0])
    maskgit.masked_cross_entropy(logits, s, is_masked).backward()
    assert torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0).is_meta
    matrices = [W for W in prior.layers.parameters() if W.ndim == 2]
    train_stage2.Muon(matrices, torch.tensor(0.1, device="meta")).step()
    assert sample.generate(prior.eval(), 32, s[:, 0], s, 3, 1.0, 2.0, 2).is_meta
    assert maskgit.nll_bound(maskgit.guided(prior, s[:, 0]), s, 32).is_meta


# ---- the scripts --------------------------------------------------------------------------------


@pytest.mark.parametrize("ssl", SSL)
def test_end_to_end(ssl, small, tmp_path, monkeypatch):
    run, shifts = tmp_path / "run", watched(monkeypatch, data, "time_shift")
    ran = script("train_stage1", "--run", run, "--dataset", small, "--ssl", ssl, *TINY1, *SAVE)
    assert re.findall(r'"step": (\d)', (run / "stage1.jsonl").read_text()) == ["3", "4"]
    model, project, last_rate = ran["model"], ran["project"], 5e-3 * data.one_cycle(3 / 4)
    assert same(weights(run / "stage1.pt"), [*model.state_dict().values()])
    assert not model.training and model.noise_floor.any()
    assert isinstance([*project.modules()][-1], ssl_losses.IterNorm) == (ssl == "vbcreg")
    by = torch.cat([by for (_, by), _ in shifts[:4]])  # a shift for each row
    assert by.shape == (4 * 16, 1) and by.unique().tolist() == [-1, 0, 1]
    learned = [*model.parameters(), *project.parameters()]
    assert {*ran["optimizer"].state} == {*learned}
    assert torch.nn.utils.get_total_norm([W.grad for W in learned]) < 1.0001  # clipped
    assert ran["optimizer"].param_groups[0]["lr"].item() == pytest.approx(last_rate)
    passes = watched(monkeypatch, maskgit.MaskGIT, "forward")
    ran = script("train_stage2", "--run", run, *TINY2)
    assert same(weights(run / "stage1.pt"), [*ran["vqvae"].state_dict().values()])  # frozen
    d, tokenize, passes = ran["d"], ran["vqvae"].tokenize, [args[1:] for args, _ in passes]
    assert ran["shifts"] == [-1, 0, 1]
    assert len(passes) == 4 + 2 and all((s_M == 32).any(1).all() for s_M, _ in passes)
    s_train = torch.stack([tokenize(data.time_shift(d.x_train, by)) for by in (-1, 0, 1)], 1)
    for s_M, y in passes[:4]:  # what is known and the label are of one series
        fits = (s_M[:, None, None] == s_train) | (s_M == 32)[:, None, None]  # (B,n,shifts,N)
        assert (fits.all(3).any(2) & (d.y_train == y[:, None])).any(1).all()
    for (s_M, y), x, labels in zip(passes[4:], (d.x_test, d.x_train), (d.y_test, d.y_train)):
        is_known = s_M == tokenize(x).repeat(2, 1)  # the bound's, two draws of a row
        assert (is_known | (s_M == 32)).all() and torch.equal(y, labels.repeat(2))
    by_muon = [W for group in ran["muon"].param_groups for W in group["params"]]
    assert len(by_muon) == 4 * 4 and {*by_muon} < {*ran["prior"].layers.parameters()}
    for optimizer in (ran["muon"], ran["adamw"]):
        rates = [group["lr"].item() for group in optimizer.param_groups]
        assert optimizer.state and rates == pytest.approx([last_rate] * len(rates))
    assert not ran["prior"].training
    script("sample", "--run", run, "--n", 7)
    assert {path.name for path in run.iterdir()} == FILES
    drawn, metrics = samples(run), read_metrics(run)
    assert drawn["x"].shape == (7, 1, 32) and drawn["s"].shape == (7, 5 * 8)
    assert np.isfinite(drawn["x"]).all() and set(drawn["y"]) <= {"0", "1", "2"}
    assert 0 <= metrics["stage1"]["linear_probe"] <= 1 and 1 <= metrics["stage1"]["perplexity"]
    assert metrics["stage2"]["uniform_nats_per_series"] == pytest.approx(40 * math.log(32))


def test_newest_run_other_name_and_same_bits(small, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "runs/synthetic-vbcreg")  # older, and last by name
    exec(re.search(r"```python\n(import torch\n.*?)```", PAGES[0], re.S)[1], {})
    script("train_stage1", "--dataset", small, "--ssl", "vibcreg", *TINY1)
    script("train_stage2", *TINY2)
    script("sample", "--n", 4)
    run = Path("runs/own-vbcreg")
    assert capsys.readouterr().out.count(f"run: {run}\n") == 2 and len(samples(run)["x"]) == 4
    assert all(same(weights(run / f), weights(finished / f)) for f in ("stage1.pt", "stage2.pt"))


def test_real_files_through_all_scripts(tmp_path):
    place = ("--data-dir", there(UCR / "DodgerLoopDay" / "DodgerLoopDay_TRAIN.tsv").parent)
    run = train("DodgerLoopDay", tmp_path / "run", place)
    script("sample", "--run", run, "--n", 4, "--evaluate", "--fcn-steps", 2)
    drawn = samples(run)
    assert drawn["x"].shape == (4, 1, 288) and np.isfinite(drawn["x"]).all() and drawn["y"][0]


def test_the_same_set_as_ts_and_as_txt(tmp_path):
    folder = there(UCR / "ECG200" / "ECG200_TRAIN.ts").parent  # which has both
    for path in folder.glob("ECG200_T*.t*"):
        (tmp_path / path.suffix).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.suffix)
    a, b = (data.load("ECG200", tmp_path / ending) for ending in (".ts", ".txt"))
    assert same(a[:4], b[:4]) and a.x_train.shape == (100, 1, 96) and a.classes == b.classes
    assert a.digest != b.digest


WALKS = np.random.default_rng(0).normal(size=(2, 30, 16)).cumsum(2)
ODD = {  # x_train, y_train, x_test, y_test, steps of three epochs in batches of at most 16
    "constant, of one class": (np.ones((8, 16)), ["b"] * 8, np.ones((1, 16)), ["b"], 3),
    "a class of one series": (WALKS[0], ["b"] * 29 + ["a"], WALKS[1], ["b"] * 30, 6),
    "outliers": (WALKS[0], ["a", "b"] * 15, 1e38 * np.eye(30, 16), ["a", "b"] * 15, 6)}


@pytest.mark.parametrize("case", ODD)
def test_odd_data_through_all_scripts(case, tmp_path):
    x_train, y_train, x_test, y_test, steps = ODD[case]
    path = arrays(tmp_path, x_train, x_test, y_train=y_train, y_test=y_test)
    run = train(path, tmp_path / "run", ("--codebook-size", 8, "--columns", 4), ("--epochs", 3))
    assert torch.load(run / "stage2.pt")["log"][-1]["step"] == steps
    script("sample", "--run", run, "--n", 8, "--evaluate", "--fcn-steps", 2)
    assert {path.name for path in run.iterdir()} == FILES
    drawn, tensors = samples(run), weights(run / "stage1.pt")
    assert np.isfinite(drawn["x"]).all() and drawn["s"].shape == (8, 5 * 4)
    assert all(v.isfinite().all() for v in tensors) and (8, 64) in [v.shape for v in tensors]
    assert (read_metrics(run)["stage1"]["test_mse"] is None) == (case == "outliers")


def test_channels_offsets_and_no_labels_through_all_scripts(tmp_path):
    x = WALKS.transpose(1, 0, 2) + [[0.0], [1.7e9]]
    run = train(arrays(tmp_path, x, x[:6]), tmp_path / "run")
    script("sample", "--run", run, "--n", 3)
    script("sample", "--run", run, "--n", 3, "--impute", "4:9")
    assert set(samples(run)["y"]) == {""}
    for name, shape in (("samples", (3, 2, 16)), ("imputed", (3, 10, 2, 5))):
        drawn = samples(run, name)["x"]
        assert drawn.dtype == np.float64 and drawn.shape == shape and np.isfinite(drawn).all()
        second = drawn[..., 1, :].ravel()  # a Unix time of which no sample has lost its seconds
        assert abs(second - 1.7e9).max() < 100 and len(np.unique(second)) > 0.9 * second.size


def test_classes_of_any_name(tmp_path, monkeypatch):
    y = ["none", "all", "caf\xe9", "$\\frac{1$"] * 7
    run = train(arrays(tmp_path, *WALKS[:, :28], y_train=y, y_test=y), tmp_path / "r\xfan")
    for label, flags in {"none": ("--label", "none"), "all": ("--label", "all"),
                         "": ("--unconditional",)}.items():
        script("sample", "--run", run, "--n", 5, *flags)
        assert set(samples(run)["y"]) == {label}
    # a terminal without these letters, and pictures without a display
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    script("sample", "--run", run, "--n", 2, "--label", "caf\xe9")
    sys.stdout.flush()
    assert b"r\\xfan samples: " in sys.stdout.buffer.getvalue()
    assert set(samples(run)["y"]) == {"caf\xe9"} and "matplotlib.pyplot" not in sys.modules


def test_a_run_folder_is_enough_to_draw_and_data_are_known_by_their_bytes(small, tmp_path, capsys):
    path, run = Path(shutil.copy(small, tmp_path / "own.npz")), tmp_path / "run"
    script("train_stage1", "--dataset", path, "--run", run, *TINY1)
    with np.load(small) as file:
        changed = dict(file) | {"x_test": file["x_test"] + 1e-3}  # of the same shape
    np.savez(path, **changed)
    stage2 = ("train_stage2", "--run", run, *TINY2)
    refused(capsys, "own.npz is not the data that stage 1 was trained on", *stage2)
    path.unlink()
    refused(capsys, "No such file or directory: .*own.npz", *stage2)
    script(*stage2, "--dataset", small)
    run = Path(shutil.move(run, tmp_path / "moved"))
    script("sample", "--run", run, "--n", 4)
    np.savez(path, **changed)
    evaluate = ("sample", "--run", run, "--n", 40, "--evaluate", "--fcn-steps", 3)
    refused(capsys, "own.npz is not the data that", *evaluate)
    script(*evaluate, "--dataset", small)
    metrics = read_metrics(run)["samples"]
    for of in ("real", "reconstructed", "generated"):
        assert metrics[f"fid_{of}"] >= 0 and 0 <= metrics[f"cas_{of}"] <= 1
        assert 1 <= metrics[f"inception_{of}"] <= 3 and metrics["novelty"] > 0


@pytest.mark.parametrize("flags", [
    "1 --seed 1", "1 --augment gaussian_noise", "1 --views 2", "1 --lr 0.1", "1 --batch-size 8",
    "1 --ssl-weight 0.5", "1 --token-noise 0", "1 --shift 0", "2 --seed 1",
    "2 --batch-size 8", "2 --lr 0.1", "2 --schedule linear", "2 --shift 0"])
def test_every_flag_of_training_has_an_effect(flags, small, finished, tmp_path):
    stage, *flags = flags.split()
    shutil.copy(finished / "stage1.pt", tmp_path / ("stage1.pt" if stage == "2" else "unused"))
    usual = TINY2 if stage == "2" else ("--dataset", small, *TINY1)
    script(f"train_stage{stage}", "--run", tmp_path, *usual, *flags)
    assert not same(*(weights(run / f"stage{stage}.pt") for run in (finished, tmp_path)))


def spoil(file, part, name, value):
    state = torch.load(file, weights_only=True)
    state[part][name] = state[part][name] + value
    torch.save(state, file)


def test_sampling(small, finished, tmp_path):
    run, drawn = shutil.copytree(finished, tmp_path / "run"), []
    with np.load(small) as file:
        x = ((file["x_test"] - file["x_train"].mean()) / file["x_train"].std())[:6]
    for start, end in ((0, 9), (31, 32), (10, 20)):
        script("sample", "--run", run, "--n", 6, "--impute", f"{start}:{end}", "--steps", 2)
        errors, filled = read_metrics(run)["imputed"], samples(run, "imputed")["x"]
        assert filled.shape == (6, 10, 1, end - start) and np.ptp(filled, 1).any()
        assert errors["mse_mean_filling"] <= errors["mse_one_filling"]
        ends = [t for t in (start - 1, end) if 0 <= t < 32]  # np.interp is flat beyond one end
        line = [np.interp(range(start, end), ends, row[ends]) for row in x]
        error = ((x[:, start:end] - line) ** 2).mean()
        assert errors["mse_straight_line"] == pytest.approx(error, rel=1e-4)
    spoil(run / "stage1.pt", "model", "noise_floor", 1.0)
    for flags in ("", "", "--seed 1", "--steps 3", "--temperature 0.1", "--guidance 3",
                  "--rounds 0", "--noise 0"):
        script("sample", "--run", run, "--n", 8, *flags.split())
        drawn.append(samples(run)["x"])
        assert np.array_equal(drawn[0], drawn[-1]) == (flags == ""), flags
    spoil(run / "stage1.pt", "shares", 0, 2.25)  # of .35 .325 .325; so the first has .8
    script("sample", "--run", run, "--n", 300, "--steps", 1, "--rounds", 0)
    assert (samples(run)["y"] == "0").mean() == pytest.approx(0.8, abs=0.08)
    (run / "stage2.pt").unlink()
    script("sample", "--run", run, "--n", 200, "--prior", "uniform", "--rounds", 1)
    share = np.bincount(samples(run)["s"].ravel(), minlength=32) / (200 * 40)
    assert abs(share - 1 / 32).max() < 0.01 and set(samples(run)["y"]) == {""}


@pytest.fixture(scope="session")
def uninterrupted(small, tmp_path_factory):
    return train(small, tmp_path_factory.mktemp("uninterrupted"), LONG, LONG)


@pytest.mark.parametrize("stage, how", [
    (1, signal.SIGTERM), (1, KILL), (2, signal.SIGINT)])
def test_stopped_and_resumed_ends_bit_equal(stage, how, small, uninterrupted, tmp_path):
    name, flags = f"train_stage{stage}", ((*TINY1, "--dataset", small), TINY2)[stage - 1] + LONG
    shutil.copy(uninterrupted / "stage1.pt", tmp_path / ("unused", "stage1.pt")[stage - 1])
    log, path = (tmp_path / f"stage{stage}.{ending}" for ending in ("jsonl", "pt"))
    command = [HERE / f"{name}.py", "--run", tmp_path, *flags, "--device", "cpu"]
    process = subprocess.Popen([sys.executable, *map(str, command)], text=True,
                               stderr=subprocess.PIPE)
    while not path.exists():
        time.sleep(0.005)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(how)
    error = process.communicate()[1]
    assert 3 <= torch.load(path)["log"][-1]["step"] < 15 and process.returncode != 0
    if how != KILL:
        assert "Traceback" not in error and "--resume goes on from the last checkpoint" in error
    # the checkpoint's flags are taken, and may be given again
    script(name, "--run", tmp_path, "--resume", *(() if how == KILL else flags))
    assert log.read_text() == (uninterrupted / log.name).read_text()
    assert same(weights(path), weights(uninterrupted / path.name))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-code-ran",)


PT = Path("run/stage2.pt")  # in the folder that the test has gone to
NOT_WHOLE = "run/stage2.pt: not a whole stage-2 checkpoint of these scripts"


@pytest.mark.parametrize("command, code, message, prepare", [  # a finished run is in ./run
    ("train_stage1 --run run", 1, "stage1.pt exists; go on from it by --resume", None),
    ("train_stage2", 1, r"no runs/\*/stage1.pt here; train that stage first", None),
    ("sample --run nowhere", 1, "nowhere/stage1.pt: not there; run train_stage1", None),
    ("sample --run run", 1, NOT_WHOLE, lambda: PT.write_bytes(PT.read_bytes()[:-5000])),
    ("sample --run run", 1, NOT_WHOLE, lambda: torch.save(Hostile(), PT)),
    ("sample --run run", 1, "train stage 2 anew: .*size mismatch for positions",
     lambda: spoil(PT, "arguments", "N", 1)),
    ("train_stage2 --run run --resume", 1, NOT_WHOLE + r".*\(it is of stage 1",
     lambda: shutil.copy("run/stage1.pt", PT)),
    *((command, 1, "tokens of another stage1.pt",
       lambda: spoil("run/stage1.pt", "model", "quantizer.codebook", 1.0))
      for command in ("sample --run run", "train_stage2 --run run --resume")),
    ("sample --run run", 1, "tokens of another stage1.pt",
     lambda: torch.save(torch.load(PT) | {"digest": "of other data"}, PT)),
    ("train_stage2 --run run --resume", 1, "loss.* not finite in steps 5 to 8; .* is kept",
     lambda: (spoil(PT, "flags", "steps", 4), spoil(PT, "model", "bias", math.nan))),
    ("train_stage2 --run run --resume --lr 0.5", 2, "--lr 0.5 contradicts .* in .*2.pt", None),
    ("train_stage1 --proj-dim 100", 2, "--proj-dim 100 is not a multiple of 64", None),
    ("train_stage1 --lr nan", 2, "--lr: nan is not between 0 and 1", None),
    ("sample --run run --label 9", 2, "--label 9: the classes are 0, 1, 2", None),
    ("sample --run run --label 1 --unconditional", 2, "not allowed with argument --label", None),
    ("sample --impute 20:10", 2, "--impute: 20:10: START must be below END", None),
    ("sample --run run --impute 20:33", 2, "which have 32 samples", None)])
def test_bad_input(command, code, message, prepare, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    if prepare:
        prepare()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    refused(capsys, message, *command.split(), code=code)
    assert before == {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}


def test_a_bug_keeps_its_traceback(finished, monkeypatch):
    monkeypatch.setattr(maskgit, "decode", lambda *_: 1 / 0)  # as edited by a reader
    with pytest.raises(ZeroDivisionError):
        script("sample", "--run", finished)
    monkeypatch.setattr(vqvae.VQVAE, "__init__", lambda self: None)
    with pytest.raises(TypeError):
        script("sample", "--run", finished)


SCRIPTS = {module.__name__: module for module in (train_stage1, train_stage2, sample)}
LIBRARIES = {"vqvae", "ssl_losses", "maskgit", "data"}


def test_pages():
    names = re.findall(r"`(\w+)\.py: ([\w.]+)`", PAGES[0])
    assert len([eval(f"{module}.{name}") for module, name in names]) > 20
    links = re.findall(r'(?:\]\(|src=")([^)"]+\.png)', "".join(PAGES))
    sizes = {path.name: path.stat().st_size for path in (HERE / "results").glob("*.png")}
    assert {Path(link).name for link in links} == set(sizes) and max(sizes.values()) < 150_000
    # each addition has its tag, and its switch in the table
    switches = [f"`{action.option_strings[0]} 0`" for module in SCRIPTS.values()
                for action in module.flags()._actions if action.help.startswith("addition")]
    code = "".join(p.read_text() for p in HERE.glob("*.py") if p != Path(__file__))
    rows = "".join(row for row in PAGES[0].splitlines() if row.startswith("|"))
    assert len(switches) == code.count("# addition:") and all(s in rows for s in switches), switches
    text = re.sub(r"```python\n.*?```", "", "".join(PAGES), flags=re.S).replace("\\\n", " ")
    commands = re.findall(r"\b(train_stage1|train_stage2|sample)\.py((?: +-[^&;|>\n#`)]*)?)", text)
    assert {name for name, _ in commands} == set(SCRIPTS)
    for name, flags in commands:
        flags = re.sub(r"\$\w+", "1", flags.replace("$SSL", "none"))
        SCRIPTS[name].flags().parse_args(flags.split())


def test_each_library_file_works_copied_alone_into_an_empty_folder(tmp_path):
    snippets = re.findall(r"```python\n(from .*?)```", PAGES[0], re.S)
    imports = re.compile(r"^ *(?:from|import) (\w+)", re.M)
    assert {name for code in snippets for name in imports.findall(code)} >= LIBRARIES
    for name in LIBRARIES:
        assert not set(imports.findall((HERE / f"{name}.py").read_text())) & LIBRARIES
    running = []
    for i, code in enumerate(snippets):
        (tmp_path / str(i)).mkdir()
        for name in set(imports.findall(code)) & LIBRARIES:
            shutil.copy(HERE / f"{name}.py", tmp_path / str(i))
        running.append(subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path / str(i)))
    assert [process.wait() for process in running] == [0] * len(snippets)
