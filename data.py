"""Time series in, and the files of a run out.

    two_patterns        the embedded data set, by its generating process
    read_*, fetch       UCR files, one's own arrays, and the download of what is absent
    load                any of these -> scaled tensors (Dataset)
    AUGMENTATIONS       the views that SSL compares
    number ... cost     what the three scripts share: flags, checkpoints, logs, interruption

Sources: Geurts 2002 (the TwoPatterns process, here re-derived from the UCR files); Dau et al. 2019
(UCR archive); Iwana and Uchida 2021 (the augmentations).

Notation: B batch, C channels, L series length; x series (B,C,L), y labels (B).
"""

import argparse
import io
import json
import math
import os
import resource
import signal
import sys
import time
import urllib.request
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

MIRRORS = (
    "https://timeseriesclassification.com/aeon-toolkit/{}.zip",
    "https://github.com/sktime/sktime-datasets/raw/main/TSC/{}.zip",
)


class Dataset(NamedTuple):
    """Scaled series (B,C,L) fp32 and labels 0..n-1 (B) int64, or None where there are none.

    classes: the labels' own names in order. mean, std (C,1): x * std + mean has the data's units.
    """

    x_train: torch.Tensor
    y_train: torch.Tensor | None
    x_test: torch.Tensor
    y_test: torch.Tensor | None
    classes: list
    mean: torch.Tensor
    std: torch.Tensor


# ---- the embedded data set ----------------------------------------------------------------------


def two_patterns(n, generator, L=128):
    """n series of the TwoPatterns process: x (n,1,L), y (n) in 0..3.

    A series holds two patterns, each `up` (-5 then +5) or `down` (+5 then -5), of independent
    length 16..32, flat, in place of a N(0,1) background; it is then z-normalised (ddof 1). Classes:
    0 down-down, 1 up-down, 2 down-up, 3 up-up (first pattern first); UCR's names are one higher.
    """
    y = torch.randint(4, (n,), generator=generator)
    l1, l2 = torch.randint(16, 33, (2, n), generator=generator)
    u1, u2 = torch.rand(2, n, generator=generator, dtype=torch.float64)
    t1 = (u1 * (L - l1 - l2)).long()
    t2 = t1 + l1 + (u2 * (L - l1 - l2 - t1)).long()
    x = torch.randn(n, L, generator=generator)
    t = torch.arange(L)
    for start, length, is_up in ((t1, l1, y % 2 == 1), (t2, l2, y >= 2)):
        since = t - start[:, None]  # (n,L)
        level = torch.where(is_up, -5.0, 5.0)[:, None]
        level = torch.where(since < (length[:, None] + 1) // 2, level, -level)
        x = torch.where((since >= 0) & (since < length[:, None]), level, x)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return x[:, None], y


# ---- files --------------------------------------------------------------------------------------


def numbered_lines(path):
    """(number, line) of a text file's lines that are neither blank nor a # comment.

    A byte-order mark is passed over. ValueError where bytes outside comments are not UTF-8.
    """
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    kept = [(i, line) for i, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]
    if any("\ufffd" in line for _, line in kept):  # what "replace" puts there
        raise ValueError(f"{path}: not a text file in UTF-8")
    return kept


def parse(fields, where):
    """Numbers of a row, '?' and NaN being missing values. ValueError that says `where`."""
    try:
        values = [float("nan" if field.strip() == "?" else field) for field in fields]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if any(map(math.isinf, values)):
        raise ValueError(f"{where}: an infinite value; remove or replace it")
    return values


def read_table(path):
    """UCR .tsv or .txt: label, then values, tab or white space between; NaN pads short series.

    Returns series, a list of (1,L) arrays, and their labels as strings.
    """
    series, labels = [], []
    for i, line in numbered_lines(path):
        label, *fields = line.split()
        expected = series[0].shape[1] if series else max(1, len(fields))
        if len(fields) != expected:
            raise ValueError(f"{path}, line {i}: {len(fields)} values after the label, expected "
                             f"{expected}, separated by tabs or spaces")
        labels.append(label)
        series.append(np.array([parse(fields, f"{path}, line {i}")]))
    return series, labels


def read_ts(path):
    """UCR/UEA .ts: '@' header, then `v1,v2,...:label`, channels separated by colons.

    Returns series, a list of (C,L) arrays, and their labels as strings (None without @classLabel).
    ValueError where the header contradicts the data.
    """
    says, names, series, labels = defaultdict(str), [], [], []
    for i, line in numbered_lines(path):
        where = f"{path}, line {i}"
        if line.startswith("@"):
            key, value = [*line[1:].lower().split(), "", ""][:2]
            says[key] = value
            names = line.split()[2:] if key == "classlabel" else names
            continue
        *channels, label = (part.strip() for part in line.split(":"))
        if says["classlabel"] != "true":
            channels.append(label)
        elif label in names:
            labels.append(label)
        else:
            raise ValueError(f"{where}: label {label!r} is not in @classLabel")
        rows = [parse(channel.split(","), where) for channel in channels]
        first = series[0] if series and says["equallength"] == "true" else rows
        C = says["dimensions"] or ("1" if says["univariate"] == "true" else str(len(rows)))
        L = says["serieslength"] or str(len(first[0]))
        lengths = [str(len(row)) for row in rows]
        if str(len(rows)) != C or set(lengths) != {L}:
            raise ValueError(f"{where}: channels of {', '.join(lengths)} values, but by the header "
                             f"(or the series before, or the first channel) {C} of {L}")
        if says["missing"] == "false" and np.isnan(sum(rows, [])).any():
            raise ValueError(f"{where}: a missing value, but the header says @missing false")
        series.append(np.array(rows))
    return series, labels or None


def read_npz(path):
    """One's own data: x_train, x_test (N,L) or (N,C,L), y_train, y_test optional.

    Returns for train and test a list of (C,L) arrays and labels as strings or None.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except OSError:
        raise
    except Exception:  # what NumPy raises depends on the bytes
        raise ValueError(f"{path}: not an .npz of plain arrays (objects are not read)") from None
    splits = []
    for split in ("train", "test"):
        x, y = arrays.get(f"x_{split}"), arrays.get(f"y_{split}")
        if x is None:
            raise ValueError(f"{path}: no array x_{split}; it holds {sorted(arrays) or 'nothing'}")
        if x.ndim not in (2, 3) or x.dtype.kind not in "iuf" or np.isinf(x).any():
            raise ValueError(f"{path}: x_{split} must be finite numbers of shape (N,L) or (N,C,L)")
        if y is not None and y.shape != (len(x),):
            raise ValueError(f"{path}: y_{split} has shape {y.shape}, x_{split} {len(x)} rows")
        x = (x[:, None] if x.ndim == 2 else x).astype(np.float64)  # (N,C,L)
        splits.append((list(x), None if y is None else [str(label) for label in y]))
    return splits


def locate(name, folder):
    """Paths of NAME_TRAIN and NAME_TEST in folder/NAME or folder (of a zip, also), or None."""
    for ending in (".tsv", ".txt", ".ts"):
        for place in (folder / name, folder):
            pair = [place / f"{name}_{split}{ending}" for split in ("TRAIN", "TEST")]
            if all(path.is_file() for path in pair):
                return pair


def fetch(name, folder, mirrors=MIRRORS, timeout=30):
    """Download NAME.zip, put its NAME_TRAIN and NAME_TEST into folder/NAME, return their paths.

    Only these two members are read; each appears whole or not at all. OSError that names every
    address tried when none of them serves such a zip.
    """
    failures = []
    for address in (mirror.format(name) for mirror in mirrors):
        try:
            pair = locate(name, zipfile.Path(io.BytesIO(download(address, timeout))))
            if not pair:
                raise ValueError(f"the zip holds no {name}_TRAIN and {name}_TEST")
            members = {path.name: path.read_bytes() for path in pair}
        except Exception as error:  # of the connection or of the zip, by many names
            failures.append(f"{address} ({str(error) or type(error).__name__})")
            continue
        for member, content in members.items():
            write(folder / name / member, content)
        return locate(name, folder)
    raise OSError(
        f"no {name}_TRAIN and {name}_TEST (.tsv, .txt or .ts) in {folder / name} or {folder}, and "
        f"no download from {' or '.join(failures)}; check the name, or put both files there by hand"
    )


def download(address, timeout):
    """Bytes of an address, under a progress bar; OSError when fewer arrive than announced."""
    content = bytearray()
    with urllib.request.urlopen(address, timeout=timeout) as response:
        size = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=address) as bar:
            while block := response.read(1 << 16):
                content += block
                bar.update(len(block))
    if len(content) < size:
        raise OSError(f"cut off after {len(content)} of {size} bytes")
    return content


# ---- from files to tensors ----------------------------------------------------------------------


def trim(series):
    """A series (C,l) without its NaN tail, the mark of a shorter series in a padded file."""
    return series[:, : np.flatnonzero(np.isfinite(series).any(0)).max(initial=-1) + 1]


def to_array(series, split, C, L):
    """A split's trimmed (C,l) series -> (B,C,L): gaps filled, lengths stretched, both linearly."""
    x, t = np.empty((len(series), C, L)), np.linspace(0, 1, L)
    for i, one in enumerate(series):
        present = np.isfinite(one)
        if len(one) != C or not present.any(1).all():
            raise ValueError(f"{split} series {i + 1}: {present.any(1).sum()} channels with any "
                             f"value, expected {C}; remove or complete it")
        own_t = np.linspace(0, 1, one.shape[1])
        x[i] = [np.interp(t, own_t[ok], row[ok]) for row, ok in zip(one, present)]
    n_stretched = sum(one.shape[1] != L for one in series)
    n_filled = sum(bool(np.isnan(one).any()) for one in series)
    if n_stretched or n_filled:
        print(f"{split}: {n_stretched} series stretched to {L}, {n_filled} with gaps filled")
    return x


def encode_labels(train, test, where):
    """Label strings -> classes in sorted order (as numbers where all are) and 0..n-1 tensors.

    ([], None, None) where there are no labels. ValueError that says `where` when one split has
    none, one is missing, or the test split holds a label that training has not seen.
    """
    if (train is None) != (test is None):
        raise ValueError(
            f"{where}: labels of one split only; give them for both splits or for neither")
    if train is None:
        return [], None, None
    if any(label.lower() in ("nan", "?") for label in train + test):
        raise ValueError(f"{where}: a label is missing (NaN or ?); complete or remove that series")
    try:
        train, test = ([repr(float(v) + 0.0).removesuffix(".0") for v in y] for y in (train, test))
        classes = sorted(set(train), key=float)
    except ValueError:
        classes = sorted(set(train))
    if unseen := sorted(set(test) - set(classes)):
        raise ValueError(
            f"{where}: test labels {unseen} do not occur in the training split {classes}")
    return classes, *(torch.tensor([classes.index(v) for v in split]) for split in (train, test))


def load(name="synthetic", folder="data", device="cpu", mirrors=MIRRORS):
    """Data set by name -> Dataset.

    `synthetic`: 1000 + 4000 series of the TwoPatterns process, the same whatever the seed.
    A path that ends in .npz: one's own arrays. Else a UCR set in `folder`, downloaded when absent.
    All series are stretched to the longest training series and scaled by the training split's mean
    and standard deviation per channel. Raises ValueError or OSError that says what is wrong where.
    """
    if name == "synthetic":
        x, y = two_patterns(5000, torch.Generator().manual_seed(0))
        series, labels = list(x.double().numpy()), [str(label + 1) for label in y.tolist()]
        splits = (series[:1000], labels[:1000]), (series[1000:], labels[1000:])
    elif name.lower().endswith(".npz"):
        splits = read_npz(Path(name))
    else:
        paths = locate(name, Path(folder)) or fetch(name, Path(folder), mirrors)
        splits = [(read_ts if path.suffix == ".ts" else read_table)(path) for path in paths]
    (train, y_train), (test, y_test) = splits
    if len(train) < 2 or not test:
        raise ValueError(f"{name}: {len(train)} training, {len(test)} test series; needs 2 and 1")
    train, test = ([trim(one) for one in split] for split in (train, test))
    C, L = len(train[0]), max(one.shape[1] for one in train)
    x_train, x_test = to_array(train, "train", C, L), to_array(test, "test", C, L)
    if max(np.abs(x).max() for x in (x_train, x_test)) > 1e37:
        raise ValueError(f"{name}: values beyond 1e37, near where fp32 ends; rescale the data")
    mean, std = x_train.mean((0, 2))[:, None], x_train.std((0, 2))[:, None]
    is_constant = (np.ptp(x_train, (0, 2)) == 0) | (std[:, 0] < 1e-37)
    if is_constant.any():
        print(f"{is_constant.sum()} constant channels, which stay constant")
        std[is_constant] = 1
    classes, y_train, y_test = encode_labels(y_train, y_test, name)
    scaled = (x_train - mean) / std, (x_test - mean) / std, mean, std
    x_train, x_test, mean, std = (torch.tensor(v).float().to(device) for v in scaled)
    y_train, y_test = (None if y is None else y.to(device) for y in (y_train, y_test))
    return Dataset(x_train, y_train, x_test, y_test, classes, mean, std)


# ---- views for SSL: batched, on the data's device, x (B,C,L) -> (B,C,L) -------------------------


def window_warp(x, window=0.4, slowest=0.9, fastest=2.0):
    """Play a random window of each series faster or slower, then stretch to the old length.

    window: its share of L. The speed is uniform in [slowest, fastest]; at speed v the window lasts
    window * L / v. Everything around it keeps its shape; between samples x is linear.
    """
    B, _, L = x.shape
    end = L - 1
    start = torch.rand(B, 1, device=x.device) * (1 - window) * end
    speed = slowest + torch.rand(B, 1, device=x.device) * (fastest - slowest)
    w = window * end
    t = torch.linspace(0, 1, L, device=x.device) * (end - w + w / speed)  # (B,L), played time
    inside, after = start + (t - start) * speed, t + w - w / speed
    t = torch.where(t < start, t, torch.where(inside < start + w, inside, after)).clamp(0, end)
    left = t.long().clamp_max(L - 2)
    index = left[:, None].expand_as(x)
    return torch.lerp(x.gather(2, index), x.gather(2, index + 1), (t - left)[:, None])


def amplitude_resize(x, deviation=0.2):
    """Multiply each series by one factor from N(1, deviation^2)."""
    return x * (1 + deviation * torch.randn(len(x), 1, 1, device=x.device))


def slice_and_shuffle(x, n_segments=4):
    """Cut each series at random places into n_segments and join them in random order."""
    B, _, L = x.shape
    cuts = torch.randint(1, L, (B, 1, n_segments - 1), device=x.device)
    segment = (torch.arange(L, device=x.device)[:, None] >= cuts).sum(2)  # (B,L), 0..n_segments-1
    place = torch.rand(B, n_segments, device=x.device).argsort(1)
    order = place.gather(1, segment).argsort(stable=True, dim=1)
    return x.gather(2, order[:, None].expand_as(x))


def gaussian_noise(x, deviation=0.05):
    """Add N(0, deviation^2) to every sample."""
    return x + deviation * torch.randn_like(x)


def time_shift(x, by):
    """x(t) -> x(t + by), by (B,1) or one number, less than L either way; the border is mirrored."""
    L = x.shape[-1]
    t = torch.arange(L, device=x.device) + by
    t = (L - 1) - (L - 1 - t.abs()).abs()  # both ends folded back into 0..L-1
    return x.gather(2, t.view(-1, 1, L).expand_as(x))


AUGMENTATIONS = {
    f.__name__: f for f in (window_warp, amplitude_resize, slice_and_shuffle, gaussian_noise)
}


def augment(x, names):
    """A view of x (B,C,L): the augmentations of these names, one after the other."""
    for name in names:
        x = AUGMENTATIONS[name](x)
    return x


# ---- what the three scripts share ---------------------------------------------------------------


def number(kind, low, high=math.inf):
    """argparse type for an int or float in [low, high]."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    convert.__name__ = kind.__name__  # argparse shows it when kind(text) fails
    return convert


def run_flags(parser, trains):
    """The flags that all scripts have, and those of the two that train."""
    add = parser.add_argument_group("run").add_argument
    add("--run", type=Path, metavar="DIR",
        help="the run's folder (default: in stage 1 runs/DATASET-SSL, then the newest in runs)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="of all random draws; on the CPU it fixes every bit (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto takes CUDA where it is there (default)")
    if trains:
        add("--resume", action="store_true", help="go on from the run's checkpoint")
        add("--save-every", type=number(int, 1), default=10, metavar="EPOCHS",
            help="epochs between checkpoints (default 10)")
    return parser


def begin(seed, device):
    """Seed torch, return the torch device; from here on bad input ends in one line on stderr."""
    def one_line(kind, error, trace):
        text = " ".join(str(error).split()) or kind.__name__
        if kind is KeyboardInterrupt:
            text = "interrupted; a trained stage goes on by --resume"
        said = KeyboardInterrupt, ValueError, OSError, MemoryError, torch.OutOfMemoryError
        if issubclass(kind, said) or "can't allocate memory" in text:  # so torch says on the CPU
            print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = one_line
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("--device cuda: no CUDA device here; use --device cpu")
    torch.manual_seed(seed)
    return torch.device("cuda" if device != "cpu" and has_cuda else "cpu")


def newest_run(file):
    """The folder below runs/ whose `file` was written last."""
    found = sorted(Path("runs").glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no runs/*/{file} here; train that stage first, or name its --run")
    print(f"run: {found[-1].parent}")
    return found[-1].parent


def write(path, content):
    """Write bytes, or what content(file) writes, whole or not at all: by renaming a temporary."""
    if callable(content):
        buffer = io.BytesIO()
        content(buffer)
        content = buffer.getbuffer()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def one_cycle(optimiser, n_steps):
    """Learning rate: a tenth of n_steps up to the optimiser's own, then to nearly 0 by a cosine."""
    # at least 11 steps: at 10 OneCycleLR's warm-up has no length, and it divides by that
    return torch.optim.lr_scheduler.OneCycleLR(
        optimiser, optimiser.defaults["lr"], total_steps=max(11, n_steps), pct_start=0.1,
        cycle_momentum=False)


def finite_means(losses, names, epoch, run):
    """Log record of an epoch: the means by name of its losses, a list of (terms,) tensors.

    Waits for the device. ValueError naming the first term that is not finite, and its step.
    """
    values = torch.stack(losses).cpu()  # (steps,terms)
    for step, term in (~values.isfinite()).nonzero().tolist():
        raise ValueError(
            f"{names[term]} became {values[step, term]} in epoch {epoch + 1}, step {step + 1}; the "
            f"last checkpoint in {run}, if any, is kept. Try a lower --lr, or look for outliers")
    return {"epoch": epoch + 1} | dict(zip(names, values.mean(0).tolist()))


def write_log(path, log):
    """Write a .jsonl file: one record a line."""
    write(path, "".join(json.dumps(record) + "\n" for record in log).encode())


def save(path, parts, flags, log, constants):
    """Write a checkpoint: all that `restore` and `rebuild` need, in plain types."""
    state = {name: part.state_dict() for name, part in parts.items()} | constants
    state |= {"log": log, "epoch": len(log), "rng": torch.get_rng_state()}
    here_only = ("run", "resume", "device", "save_every")
    state["flags"] = {k: v for k, v in flags.items() if k not in here_only}
    if torch.cuda.is_initialized():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    write(path, lambda file: torch.save(state, file))


def epochs(run, parts, flags, log, constants):
    """Yield the number, from 0, of each epoch that is left; the caller puts its record into log.

    Then the log is written, and where it is due the checkpoint. Ctrl-C or SIGTERM saves after
    the epoch and leaves, with a line on how to go on; a second one kills. parts: {name: module,
    optimiser or schedule}, saved by their state. flags: of the command line, {name: value}.
    constants: {name: anything plain}, with the stage.
    """
    received = []

    def note(signum, frame):
        received.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    name = f"stage{constants['stage']}"
    write_log(run / f"{name}.jsonl", log)  # a resumed run forgets the epochs after its checkpoint
    last = flags["epochs"]
    for epoch in tqdm(range(len(log), last), initial=len(log), total=last):
        yield epoch
        write_log(run / f"{name}.jsonl", log)
        stop = bool(received)  # read once: a signal may come between two looks
        if stop or len(log) % flags["save_every"] == 0 or len(log) == last:
            save(run / f"{name}.pt", parts, flags, log, constants)
        if stop:
            sys.exit(f"stopped after epoch {len(log)}; go on with --run {run} --resume")
    for signum, handler in before.items():
        signal.signal(signum, handler)


def load_checkpoint(path, stage):
    """Checkpoint of that stage, on the CPU; plain types only. ValueError for any other file."""
    if not path.exists():
        raise ValueError(f"{path}: not there; run train_stage{stage}.py first, or see --run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        expected = {"arguments", "flags", "log", "rng", "epoch"}
        expected |= {"model", "shape"} if stage == 1 else {"prior", "codes"}
        if state["stage"] == stage and expected <= set(state):
            return state
        reason = f"it is of stage {state['stage']} and holds {sorted(state)}"
    except Exception as error:  # what an unpickler raises depends on the bytes
        reason = type(error).__name__
    raise ValueError(f"{path}: not a whole stage-{stage} checkpoint of these scripts ({reason})")


def resume(parser, args, path, stage):
    """The flags to go on with, and the checkpoint at `path` if --resume is given, else None.

    Flags not given take the checkpoint's values; those given must agree with it.
    """
    if not args.resume:
        if path.exists():
            raise ValueError(f"{path} exists; go on from it by --resume, or choose another --run")
        return args, None
    if not path.exists():
        raise ValueError(f"{path}: not there, so nothing to --resume; leave it out, or see --run")
    state = load_checkpoint(path, stage)
    parser.set_defaults(**state["flags"])
    args = parser.parse_args()
    wrong = [f"--{name.replace('_', '-')} {getattr(args, name)} contradicts {value}"
             for name, value in state["flags"].items() if value != getattr(args, name)]
    if wrong:
        parser.error(f"{' and '.join(wrong)} in {path}")
    if state["epoch"] == args.epochs:
        print(f"{path}: all {args.epochs} epochs are done already")
    return args, state


def restore(state, parts):
    """Load a checkpoint (or None) into parts and the random state -> its log, a record an epoch.

    ValueError if it does not fit.
    """
    if state is None:
        return []
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
    except (KeyError, RuntimeError, TypeError):
        raise ValueError("the checkpoint does not fit the script here; start again") from None
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])
    return state["log"]


def rebuild(kind, arguments, weights, device):
    """The model of a checkpoint, frozen and in eval mode. ValueError if the weights do not fit."""
    try:
        model = kind(**arguments).to(device)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError):
        raise ValueError(f"a checkpoint's weights do not fit the {kind.__name__} here") from None
    return model.eval().requires_grad_(False)


@torch.no_grad()
def in_batches(function, x):
    """function(x), of rows, a batch at a time."""
    return torch.cat([function(rows) for rows in x.split(500)])


def load_again(stage1, device):
    """The data set of a stage-1 checkpoint; ValueError if its shape has changed."""
    if stage1["epoch"] < stage1["flags"]["epochs"]:
        print(f"stage 1 stopped after epoch {stage1['epoch']} of {stage1['flags']['epochs']}")
    name = stage1["flags"]["dataset"]
    d = load(name, stage1["flags"]["data_dir"], device)
    shape = [len(d.classes), *d.x_train.shape]
    if shape != stage1["shape"]:
        raise ValueError(f"{name} has changed since stage 1: classes, training series, channels, "
                         f"length were {stage1['shape']}, are {shape}")
    return d


def report(run, part, metrics):
    """Put a part's figures (stage1, stage2, samples, imputed) into metrics.json and print them."""
    path = run / "metrics.json"
    try:
        known = dict(json.loads(path.read_text())) if path.exists() else {}
        if part.startswith("stage"):  # a resumed stage that had nothing left to do keeps its times
            metrics = known.get(part, {}) | metrics
    except (ValueError, TypeError):
        raise ValueError(f"{path}: not figures of these scripts; move it away") from None
    write(path, json.dumps(known | {part: metrics}, indent=2).encode())
    print(f"{run} {part}:", ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


def cost(began, n_steps, B, device):
    """Time and rate of n_steps of B series since `began`; peak MiB, on the CPU of the process."""
    unit = 1 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    seconds = (time.perf_counter() - began) / max(1, n_steps)
    figures = {"seconds_per_step": seconds, "series_per_second": B / seconds} if n_steps else {}
    return figures | {"peak_MiB": peak / 2**20}
