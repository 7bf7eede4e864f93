"""Time series in, and the files of a run out.

    two_patterns             the embedded data set, by its generating process
    read_table, read_ts, read_npz, fetch
                             UCR files, one's own arrays, and the download of what is absent
    load                     any of these -> scaled tensors (Dataset)
    window_warp, amplitude_resize, slice_and_shuffle, gaussian_noise, augment
                             the views that SSL compares
    number, prepare, newest_run, save, load_checkpoint, ...
                             what the three scripts share: flags, checkpoints, logs, interruption

Sources: Geurts 2002 (the TwoPatterns process, here re-derived from the UCR files); Dau et al. 2019
(UCR archive); Iwana and Uchida 2021 (the augmentations).

Notation: B batch, C channels, L series length; x series (B,C,L), y labels (B).
"""

import argparse
import io
import json
import os
import pickle
import resource
import signal
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

MIRRORS = (
    "https://timeseriesclassification.com/aeon-toolkit/{}.zip",
    "https://github.com/sktime/sktime-datasets/raw/main/TSC/{}.zip",
)
MIN_LENGTH = 8  # one STFT window


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
    0 down-down, 1 up-down, 2 down-up, 3 up-up, where the first word is the first pattern.
    """

    def uniform():
        return torch.rand(n, generator=generator, dtype=torch.float64)

    y = torch.randint(4, (n,), generator=generator)
    l1, l2 = torch.randint(16, 33, (2, n), generator=generator)
    t1 = (uniform() * (L - l1 - l2)).long()
    t2 = t1 + l1 + (uniform() * (L - l1 - l2 - t1)).long()
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


def parse(field, path, line):
    """One number; '?' and NaN are missing values. ValueError naming file and line otherwise."""
    try:
        value = float("nan" if field.strip() == "?" else field)
    except ValueError:
        raise ValueError(f"{path}, line {line}: {field.strip()[:40]!r} is no number") from None
    if np.isinf(value):
        raise ValueError(f"{path}, line {line}: an infinite value; remove or replace it")
    return value


def lines(path):
    """Numbered lines of a text file that are not blank."""
    try:
        text = path.read_text(encoding="utf-8", errors="strict")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    return [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def read_table(path):
    """UCR .tsv or .txt: label, then values, tab or white space between; NaN pads short series.

    Returns series, a list of (1,L) arrays, and their labels as strings.
    """
    series, labels = [], []
    for i, line in lines(path):
        fields = line.split()
        if len(fields) < 2:
            raise ValueError(f"{path}, line {i}: no values after the label; separate by tabs")
        if series and len(fields) - 1 != series[0].shape[1]:
            expected = series[0].shape[1]
            raise ValueError(f"{path}, line {i}: {len(fields) - 1} values, {expected} above")
        labels.append(fields[0])
        series.append(np.array([[parse(f, path, i) for f in fields[1:]]]))
    return series, labels


def read_ts(path):
    """UCR/UEA .ts: '@' header, then `v1,v2,...:label`, channels separated by colons.

    Returns series, a list of (C,L) arrays, and their labels as strings (None without @classLabel).
    A header that contradicts its data is refused.
    """
    header, series, labels = {}, [], []
    rows = [(i, line) for i, line in lines(path) if not line.startswith("#")]
    for i, line in rows:
        if line.startswith("@"):
            key, _, value = line[1:].partition(" ")
            header[key.lower()] = value.split()
            continue
        fields = line.split(":")
        if header.get("classlabel", ["false"])[0].lower() == "true":
            labels.append(fields.pop().strip())
            if labels[-1] not in header["classlabel"][1:]:
                raise ValueError(f"{path}, line {i}: label {labels[-1]!r} is not in @classLabel")
        channels = [[parse(f, path, i) for f in channel.split(",")] for channel in fields]
        sizes = {len(channel) for channel in channels}
        if len(sizes) > 1:
            raise ValueError(f"{path}, line {i}: channels of unequal lengths {sorted(sizes)}")
        series.append(np.array(channels))
        declared = [series[0].shape[1]] if header.get("equallength") == ["true"] else []
        declared += [int(n) for n in header.get("serieslength", []) if n.isdigit()]
        for size in declared:
            if size != series[-1].shape[1]:
                raise ValueError(
                    f"{path}, line {i}: {series[-1].shape[1]} values, the header says {size}"
                )
        n_channels = 1 if header.get("univariate") == ["true"] else len(series[0])
        if len(channels) != n_channels:
            raise ValueError(f"{path}, line {i}: {len(channels)} channels, expected {n_channels}")
    return series, labels or None


def read_npz(path):
    """One's own data: x_train, x_test (N,L) or (N,C,L), y_train, y_test optional.

    Returns for train and test a list of (C,L) arrays and labels as strings or None.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError, pickle.UnpicklingError):
        raise ValueError(f"{path}: not an .npz of plain arrays (no objects, no pickle)") from None
    splits = []
    for split in ("train", "test"):
        x, y = arrays.get(f"x_{split}"), arrays.get(f"y_{split}")
        if x is None:
            raise ValueError(f"{path}: no array x_{split}; it holds {sorted(arrays) or 'nothing'}")
        if x.ndim not in (2, 3) or x.dtype.kind not in "iuf" or np.isinf(x).any():
            raise ValueError(f"{path}: x_{split} must be finite numbers of shape (N,L) or (N,C,L)")
        if y is not None and y.shape != (len(x),):
            raise ValueError(f"{path}: y_{split} has shape {y.shape}, x_{split} {len(x)} rows")
        x = np.asarray(x, np.float64).reshape(len(x), -1, x.shape[-1])
        splits.append((list(x), None if y is None else [str(label) for label in y]))
    return splits


def fetch(name, folder, mirrors=MIRRORS, timeout=30):
    """Download NAME.zip and put its NAME_TRAIN and NAME_TEST files (.ts or .txt) into folder/NAME.

    Both are written beside their place, then renamed; only these two members are read. Raises
    OSError that names every address tried when none of them serves such a zip.
    """
    failures = []
    for address in (mirror.format(name) for mirror in mirrors):
        try:
            members = unpack(download(address, timeout), name)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            failures.append(f"{address} ({error})")
            continue
        for member, content in members.items():
            with replacing(folder / name / member) as path:
                path.write_bytes(content)
        return
    raise OSError(
        f"no data set {name!r} in {folder}, and no download: {'; '.join(failures)}. Check the "
        f"spelling, or put {name}_TRAIN.tsv and {name}_TEST.tsv into {folder / name} by hand"
    )


def download(address, timeout):
    """Bytes of an address, under a progress bar; OSError when fewer arrive than announced."""
    content = io.BytesIO()
    with urllib.request.urlopen(address, timeout=timeout) as response:
        size = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=address) as bar:
            while block := response.read(1 << 16):
                content.write(block)
                bar.update(len(block))
    if content.tell() < size:
        raise OSError(f"cut off after {content.tell()} of {size} bytes")
    return content.getvalue()


def unpack(content, name):
    """The two members wanted of a zip, {file name: bytes}; a path that climbs out is not one."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for ending in (".ts", ".txt", ".tsv"):
            wanted = [f"{name}_{split}{ending}" for split in ("TRAIN", "TEST")]
            for prefix in ("", f"{name}/"):
                if all(prefix + member in archive.namelist() for member in wanted):
                    return {member: archive.read(prefix + member) for member in wanted}
    raise ValueError(f"the zip holds no {name}_TRAIN and {name}_TEST")


# ---- from files to tensors ----------------------------------------------------------------------


def trim(series):
    """A series (C,l) without its NaN tail, the mark of a shorter series in a padded file."""
    present = np.flatnonzero(np.isfinite(series).any(0))
    return series[:, : present[-1] + 1 if len(present) else 0]


def to_array(series, split, L, C):
    """A split's trimmed (C,l) series -> (B,C,L): gaps filled, lengths stretched, both linearly.

    Prints how many series that touched.
    """
    x, t = np.empty((len(series), C, L)), np.linspace(0, 1, L)
    for i, one in enumerate(series):
        present = np.isfinite(one)
        if len(one) != C:
            raise ValueError(f"{split} series {i + 1} has {len(one)} channels, the first has {C}")
        if not present.any(1).all():
            raise ValueError(f"{split} series {i + 1} has a channel without any value; remove it")
        own_t = np.linspace(0, 1, one.shape[1])
        x[i] = [np.interp(t, own_t[ok], row[ok]) for row, ok in zip(one, present)]
    n_stretched = sum(one.shape[1] != L for one in series)
    n_filled = sum(bool(np.isnan(one).any()) for one in series)
    if n_stretched or n_filled:
        print(f"{split}: {n_stretched} series stretched to {L} samples, {n_filled} with gaps filled")
    return x


def encode_labels(train, test):
    """Label strings -> classes in sorted order (as numbers where all are) and 0..n-1 tensors.

    ValueError when the test split holds a label that training has not seen.
    """
    try:
        train, test = ([f"{float(label):g}" for label in split] for split in (train, test))
        classes = sorted(set(train), key=float)
    except ValueError:
        classes = sorted(set(train))
    unseen = sorted(set(test) - set(classes))
    if unseen:
        raise ValueError(f"test labels {unseen} do not occur in the training split {classes}")
    return classes, *(torch.tensor([classes.index(v) for v in split]) for split in (train, test))


def locate(name, folder):
    """Paths of NAME_TRAIN and NAME_TEST in folder/NAME or folder, or None."""
    for ending in (".tsv", ".txt", ".ts"):
        for place in (folder / name, folder):
            pair = [place / f"{name}_{split}{ending}" for split in ("TRAIN", "TEST")]
            if all(path.is_file() for path in pair):
                return pair
    return None


def load(name="synthetic", folder="data", device="cpu", mirrors=MIRRORS):
    """Data set by name -> Dataset.

    `synthetic`: 1000 + 4000 series of the TwoPatterns process, the same whatever the seed.
    A path that ends in .npz: one's own arrays. Else a UCR set in `folder`, downloaded when absent.
    All series are stretched to the longest training series and scaled by the training split's mean
    and standard deviation per channel. Raises ValueError or OSError that says what is wrong where.
    """
    if name == "synthetic":
        x, y = two_patterns(5000, torch.Generator().manual_seed(0))
        names = list("1234")
        splits = [(list(part.double().numpy()), [names[i] for i in labels])
                  for part, labels in ((x[:1000], y[:1000]), (x[1000:], y[1000:]))]
    elif name.endswith(".npz"):
        splits = read_npz(Path(name))
    else:
        if not locate(name, Path(folder)):
            fetch(name, Path(folder), mirrors)
        splits = [(read_ts if path.suffix == ".ts" else read_table)(path)
                  for path in locate(name, Path(folder))]
    (train, y_train), (test, y_test) = splits
    if len(train) < 2 or not test:
        raise ValueError(f"{name}: {len(train)} training and {len(test)} test series; needs 2 and 1")
    train, test = [trim(one) for one in train], [trim(one) for one in test]
    C, L = len(train[0]), max(one.shape[1] for one in train)
    if L < MIN_LENGTH:
        raise ValueError(f"{name}: series of {L} samples; at least {MIN_LENGTH} are needed")
    x_train, x_test = to_array(train, "train", L, C), to_array(test, "test", L, C)
    mean, std = x_train.mean((0, 2))[:, None], x_train.std((0, 2))[:, None]
    std[std == 0] = 1  # a constant channel stays constant
    classes = []
    if y_train and y_test:
        classes, y_train, y_test = encode_labels(y_train, y_test)
    else:
        y_train = y_test = None
    x_train, x_test, mean, std = (
        torch.tensor(v).float().to(device) for v in ((x_train - mean) / std, (x_test - mean) / std, mean, std)
    )
    y_train, y_test = (y if y is None else y.to(device) for y in (y_train, y_test))
    return Dataset(x_train, y_train, x_test, y_test, classes, mean, std)


# ---- views for SSL: batched, on the data's device, x (B,C,L) -> (B,C,L) -------------------------


def read_at(x, t):
    """x (B,C,L) at the fractional times t (B,L), between samples by linear interpolation."""
    t = t.clamp(0, x.shape[-1] - 1)
    left = t.long().clamp_max(x.shape[-1] - 2)
    index = left[:, None].expand_as(x)
    return torch.lerp(x.gather(2, index), x.gather(2, index + 1), (t - left)[:, None])


def window_warp(x, window=0.4, slowest=0.9, fastest=2.0):
    """Play a random window of each series faster or slower, then stretch to the old length.

    window: its share of L. The speed is uniform in [slowest, fastest]; at speed v the window lasts
    window * L / v. Everything around it keeps its shape.
    """
    B, _, L = x.shape
    end = L - 1
    start = torch.rand(B, 1, device=x.device) * (1 - window) * end
    speed = slowest + torch.rand(B, 1, device=x.device) * (fastest - slowest)
    w = window * end
    t = torch.linspace(0, 1, L, device=x.device) * (end - w + w / speed)  # (B,L), played time
    inside = start + (t - start) * speed
    after = t + w - w / speed
    return read_at(x, torch.where(t < start, t, torch.where(inside < start + w, inside, after)))


def amplitude_resize(x, deviation=0.2):
    """Multiply each series by one factor from N(1, deviation^2)."""
    return x * (1 + deviation * torch.randn(len(x), 1, 1, device=x.device))


def slice_and_shuffle(x, n_segments=4):
    """Cut each series at random places into n_segments and join them in random order."""
    B, _, L = x.shape
    cuts = torch.randint(1, L, (B, n_segments - 1), device=x.device).sort(1).values
    t = torch.arange(L, device=x.device).expand(B, L).contiguous()
    segment = torch.searchsorted(cuts, t, right=True)  # (B,L), 0..n_segments-1
    place = torch.rand(B, n_segments, device=x.device).argsort(1)
    order = place.gather(1, segment).argsort(stable=True, dim=1)
    return x.gather(2, order[:, None].expand_as(x))


def gaussian_noise(x, deviation=0.05):
    """Add N(0, deviation^2) to every sample."""
    return x + deviation * torch.randn_like(x)


AUGMENTATIONS = {
    f.__name__: f for f in (window_warp, amplitude_resize, slice_and_shuffle, gaussian_noise)
}


def augment(x, names):
    """A view of x (B,C,L): the augmentations of these names, one after the other."""
    for name in names:
        x = AUGMENTATIONS[name](x)
    return x


# ---- what the three scripts share ---------------------------------------------------------------


def number(kind, low, high=float("inf")):
    """argparse type for an int or float in [low, high]."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    convert.__name__ = kind.__name__  # argparse shows it when kind(text) fails
    return convert


def run_flags(parser):
    """The flags that all scripts have."""
    group = parser.add_argument_group("run")
    group.add_argument("--run", type=Path, metavar="DIR", help="folder that holds the run's files")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0,
                       help="of all random draws; on the CPU it fixes every bit (default 0)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                       help="auto takes CUDA where it is there (default)")
    return group


def begin(args):
    """Seed torch and choose the device; from here on bad input ends in one line on stderr."""

    def one_line(kind, error, trace):
        if issubclass(kind, (ValueError, OSError)):
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = one_line
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here; use --device cpu")
    torch.manual_seed(args.seed)
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def newest_run(file):
    """The folder below runs/ whose `file` was written last."""
    found = sorted(Path("runs").glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no runs/*/{file} here; train that stage first, or name its --run")
    print(f"run: {found[-1].parent}")
    return found[-1].parent


class replacing:
    """Context: a temporary path beside `path` that takes its place if the block succeeds."""

    def __init__(self, path):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, kind, error, trace):
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def save(path, state):
    """Write a checkpoint whole or not at all."""
    content = io.BytesIO()
    torch.save(state, content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path, stage):
    """Checkpoint of that stage, on the CPU; only plain types are unpickled. ValueError if foreign."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["stage"] == stage:
            return state
        reason = f"it is of stage {state['stage']}"
    except FileNotFoundError:
        raise ValueError(f"{path}: not there; run train_stage{stage}.py first") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0][:100] or type(error).__name__
    raise ValueError(f"{path}: not a stage-{stage} checkpoint of these scripts ({reason})")


def state_of(parts, stage, epoch, args, arguments):
    """A checkpoint in plain types: parts {name: module, optimiser, ...}, flags, constructor
    arguments, epochs done and the random state.
    """
    flags = {k: v for k, v in vars(args).items() if k not in ("run", "resume", "device")}
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    state = {name: part.state_dict() for name, part in parts.items()}
    return state | {"stage": stage, "epoch": epoch, "flags": flags, "arguments": arguments,
                    "rng": rng}


def resume(parser, args, run, stage):
    """The run's checkpoint when --resume is given, else None; and the flags to go on with.

    Flags not given take the checkpoint's values; those given must agree with it. Without --resume
    a checkpoint in the way is refused.
    """
    path = run / f"stage{stage}.pt"
    if not args.resume:
        if path.exists():
            raise ValueError(f"{path} exists; go on with it by --resume, or choose another --run")
        return args, None
    state = load_checkpoint(path, stage)
    parser.set_defaults(**state["flags"])
    args = parser.parse_args()
    for name, value in state["flags"].items():
        if name != "save_every" and getattr(args, name) != value:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} {getattr(args, name)} contradicts {path}, made with {value}")
    if state["epoch"] == args.epochs:
        print(f"{path}: all {args.epochs} epochs are done")
    return args, state


def restore(parts, state):
    """Load a checkpoint into its parts and the random state; returns the number of epochs done."""
    if state is None:
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng"]["cuda"])
    return state["epoch"]


def rebuild(kind, state, part, device):
    """The model of a checkpoint, in eval mode and frozen: kind(**arguments) with its weights."""
    prefix = f"{part}."
    weights = state.get(part) or {k.removeprefix(prefix): v for k, v in state["trained"].items()
                                  if k.startswith(prefix)}
    model = kind(**state["arguments"]).to(device)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def load_again(stage1, device):
    """The data set that a stage-1 checkpoint was trained on."""
    d = load(stage1["flags"]["dataset"], stage1["flags"]["data_dir"], device)
    if d.x_train.shape[1:] != (stage1["arguments"]["C"], stage1["arguments"]["L"]):
        raise ValueError(f"{stage1['flags']['dataset']} has changed shape since stage 1")
    return d


def finite_means(losses, names, epoch, run):
    """Means of an epoch's losses, a list of (terms,) tensors, by name: the epoch's one wait for the
    device. ValueError naming the first term that is not finite, and its step.
    """
    values = torch.stack(losses).cpu()  # (steps,terms)
    broken = (~values.isfinite()).nonzero()
    if len(broken):
        step, term = broken[0].tolist()
        raise ValueError(
            f"{names[term]} became {values[step, term]} in epoch {epoch + 1}, step {step + 1}; the "
            f"last checkpoint in {run} is kept. Try a lower --lr, or look for outliers in the data"
        )
    return dict(zip(names, values.mean(0).tolist()))


def start_log(path, n_epochs):
    """Keep the first n_epochs lines of a .jsonl log (0 for a new run); later ones are stale."""
    kept = path.read_text().splitlines(True)[:n_epochs] if n_epochs else []
    with replacing(path) as temporary:
        temporary.write_text("".join(kept))


def append_line(path, record):
    """Add one JSON line."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_log(path):
    """The log as {name: list of values, one an epoch}."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: [record[name] for record in records] for name in records[0]}


def write_metrics(run, part, metrics):
    """Set one part (stage1, stage2, samples, ...) of the run's metrics.json."""
    path = run / "metrics.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(known | {part: metrics}, indent=2) + "\n")


def save_figure(run, name, figure):
    """Write a picture whole or not at all."""
    with replacing(run / name) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def watch_signals():
    """A list that Ctrl-C or SIGTERM adds to, to be looked at between epochs; a second one kills."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return received


def peak_memory(device):
    """Peak memory in MiB: of the GPU's allocator, or of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
