"""Time series in, and the files of a run out.

    two_patterns                    the embedded data set, by its generating process
    read_table, read_ts, read_npz   UCR files and one's own arrays
    locate, fetch                   a UCR set on disk, else from the archive's mirrors
    load                            any of these -> scaled tensors (Dataset)
    AUGMENTATIONS                   the views that SSL compares
    one_line_errors ... report      what the three scripts share

What is read is right, or it is Refused in one line that says file, place and remedy.
Sources: Geurts 2002 (the TwoPatterns process, here re-derived from the UCR files); Dau et al. 2019
(UCR archive); Iwana and Uchida 2021 (the augmentations).

Notation: B batch, C channels, L series length; x series (B,C,L), y labels (B).
"""

import argparse
import hashlib
import io
import json
import math
import signal
import sys
import tempfile
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

MIRRORS = (
    "https://timeseriesclassification.com/aeon-toolkit/{}.zip",
    "https://github.com/sktime/sktime-datasets/raw/main/TSC/{}.zip",
)


class Refused(Exception):
    """What a user can mend; the scripts turn it into one line and exit code 1."""


class Dataset(NamedTuple):
    """Scaled series (B,C,L) fp32 and labels 0..n-1 (B) int64, or None where there are none.

    classes: the labels' own names in order. mean, std (C,1) float64: x * std + mean has the data's
    units. digest: SHA-256 of each data file's bytes, in hex (of the embedded set, its name).
    """

    x_train: torch.Tensor
    y_train: torch.Tensor | None
    x_test: torch.Tensor
    y_test: torch.Tensor | None
    classes: list
    mean: torch.Tensor
    std: torch.Tensor
    digest: str


# ---- the embedded data set ----------------------------------------------------------------------


def two_patterns(n, generator):
    """n series of the TwoPatterns process: x (n,1,128), y (n) in 0..3.

    A series holds two patterns, each `up` (-5 then +5) or `down` (+5 then -5), of independent
    length 16..32, flat, in place of a N(0,1) background; it is then z-normalised (ddof 1). Classes:
    0 down-down, 1 up-down, 2 down-up, 3 up-up (first pattern first); UCR's names are one higher.
    """
    y = torch.randint(4, (n,), generator=generator)
    l1, l2 = torch.randint(16, 33, (2, n), generator=generator)
    u1, u2 = torch.rand(2, n, generator=generator, dtype=torch.float64)
    t1 = (u1 * (128 - l1 - l2)).long()
    t2 = t1 + l1 + (u2 * (128 - l1 - l2 - t1)).long()
    x = torch.randn(n, 128, generator=generator)
    t = torch.arange(128)
    for start, length, is_up in ((t1, l1, y % 2 == 1), (t2, l2, y >= 2)):
        since = t - start[:, None]  # (n,128)
        level = torch.where(is_up, -5.0, 5.0)[:, None]
        level = torch.where(since < (length[:, None] + 1) // 2, level, -level)
        x = torch.where((since >= 0) & (since < length[:, None]), level, x)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return x[:, None], y


# ---- readers: series (C,l) with NaN for missing values, and their class names or None -----------


def to_float(field):
    """A field's finite number, NaN where it is empty, '?' or NaN; else ValueError."""
    value = float("nan" if field.strip() in ("", "?") else field)
    # float() also takes 1_1 for 11, and digits of other scripts
    if "_" in field or not field.isascii() or math.isinf(value):
        raise ValueError(field)
    return value


def to_floats(fields, where, expected):
    """Numbers of a row. Refused with `where`, the column, and what was `expected`."""
    values = []
    for column, field in enumerate(fields, 1):
        try:
            values.append(to_float(field))
        except ValueError:
            raise Refused(f"{where}, column {column}: {field[:30]!r} is no finite number; "
                          f"expected {expected}; a missing value is empty, ? or NaN") from None
    return values


def class_name(label, where):
    """'1' for '1', '1.0' and '01', which are one class; a word is itself."""
    try:
        value = to_float(label) + 0.0  # and -0 is 0
    except ValueError:
        return label
    if not abs(value) < 2**53:  # NaN, or so large that float64 merges it with others
        raise Refused(f"{where}: the label is missing or not below 2^53 ({label!r}); complete it, "
                      "use smaller numbers or words, or remove the series")
    return repr(value).removesuffix(".0")


def text_lines(path):
    """(number from 1, line) of a file's lines that are not blank; what is no UTF-8 as \\xNN."""
    text = path.read_text(encoding="utf-8-sig", errors="backslashreplace")
    lines = enumerate(text.split("\n"), 1)
    lines = [(i, line) for i, line in lines if line.strip() or "\t" in line]  # tabs: all missing
    if not lines or "\0" in text:
        raise Refused(f"{path}: the file is empty, or not text in UTF-8; save it again")
    return lines


def read_table(path):
    """UCR .tsv or .txt: numbers only, label first, tabs or else white space between them."""
    lines = text_lines(path)
    delimiter = "\t" if any("\t" in line for _, line in lines) else None
    expected = "numbers between spaces, or between tabs if any line has one; for words .ts or .npz"
    try:
        table = np.loadtxt([line for _, line in lines], delimiter=delimiter, comments=None,
                           converters=to_float, encoding="utf-8", ndmin=2)
    except ValueError:  # whose text counts rows from 0 or from 1, without the blank ones
        rows = [to_floats(line.split(delimiter), f"{path}, line {i}", expected)
                for i, line in lines]
        n, wrong = len(rows[0]), [k for k, row in enumerate(rows) if len(row) != len(rows[0])]
        raise Refused(f"{path}, line {lines[wrong[0]][0]}: {len(rows[wrong[0]])} fields, expected "
                      f"{n} as in the first row; fill up shorter series with NaN") from None
    labels = [class_name(line.split(delimiter, 1)[0], f"{path}, line {i}") for i, line in lines]
    return list(table[:, None, 1:]), labels


def read_ts_row(line, has_labels, where):
    """One series (C,l) and its class name, or None where rows have no label."""
    *channels, label = line.split(":")
    expected = "numbers with commas between them, then a colon and a label"
    if has_labels and "," in label:
        raise Refused(f"{where}: {label.strip()[:30]!r} stands where the header announces a label, "
                      "after the last colon; add labels, without commas")
    if not has_labels:
        channels += [label] if label.strip() else []
        expected = "numbers with commas between them, as the header has no '@classLabel true'"
    rows = [to_floats(channel.split(","), f"{where}, channel {c}", expected)
            for c, channel in enumerate(channels, 1)]
    lengths = [len(row) for row in rows]
    if len(set(lengths)) != 1:
        raise Refused(f"{where}: channels of lengths {lengths}; expected equal ones, of {expected}")
    return np.array(rows), class_name(label.strip(), where) if has_labels else None


def read_ts(path):
    """UCR/UEA .ts: header, '@data', then rows `v1,v2,...:v1,v2,...:label`, a part for each channel.

    Rows have a label only after '@classLabel true'. Other lines of the header bind nothing, except
    that ARFF, time stamps and regression targets are Refused. Lines with % or # first are comments.
    """
    lines = ((i, line.strip()) for i, line in text_lines(path))
    lines = ((i, line) for i, line in lines if line and line[0] not in "%#")
    has_labels = False
    for i, line in lines:
        key, value, *_ = [*line.lower().split(), ""]
        if line.lower() == "@data":
            break
        if key == "@attribute":
            raise Refused(f"{path}, line {i}: ARFF is not read; take the archive's .txt or .ts")
        if key in ("@timestamps", "@targetlabel") and value == "true":
            raise Refused(f"{path}, line {i}: time stamps and regression targets are not read; "
                          "take them out of header and rows")
        has_labels |= (key, value) == ("@classlabel", "true")
    else:
        raise Refused(f"{path}: no line '@data'; put it between header and series")
    rows = [read_ts_row(line, has_labels, f"{path}, line {i}") for i, line in lines]  # the rest
    return [x for x, _ in rows], [label for _, label in rows] if has_labels else None


def read_npz(path, split):
    """One's own data, split "train" or "test": x_train (N,L) or (N,C,L) and, optional, y_train (N).

    A hint is printed where x may be (N,L,C). No other array is looked at.
    """
    with path.open("rb") as content:  # outside the try: `read` reports an OSError
        try:
            with np.load(content, allow_pickle=False) as file:
                x, y = file[f"x_{split}"], file.get(f"y_{split}")
        except Exception as error:  # what NumPy raises depends on the bytes
            raise Refused(f"{path}: not an .npz of plain arrays ({error}); save x_train, x_test "
                          "and, for labels, y_train, y_test by np.savez, none with objects: "
                          "y.astype(str), and shorter series filled up with NaN") from None
    where = f"{path}: x_{split}"
    if x.ndim not in (2, 3) or x.dtype.kind not in "iuf":
        raise Refused(f"{where} is {x.dtype} of shape {x.shape}; expected numbers (N,L) or (N,C,L)")
    values = x.astype(np.float64)
    is_lost = abs(values) >= (2**53 if x.dtype.kind in "iu" else np.inf)
    if is_lost.any():
        index = np.argwhere(is_lost)[0].tolist()
        raise Refused(f"{where}{index} is infinite, or an integer of 2^53 or more, which float64 "
                      "rounds; remove or replace it")
    x = values[:, None] if x.ndim == 2 else values
    if x.shape[1] > x.shape[2]:
        print(f"{where} is read as (N,C,L), {x.shape[1]} channels of {x.shape[2]} samples; if it "
              "is (N,L,C), save its swapaxes(1, 2)")
    if y is not None:
        if y.shape != (len(x),):
            raise Refused(f"{path}: y_{split} has shape {y.shape}; expected a label for each of "
                          f"the {len(x)} rows of x_{split}, in one dimension")
        y = np.char.decode(y, "utf-8", "backslashreplace") if y.dtype.kind == "S" else y
        y = [class_name(str(v), f"{path}: y_{split}[{i}]") for i, v in enumerate(y)]
    return list(x), y


def locate(name, folder):
    """Paths of NAME_TRAIN and NAME_TEST in folder/NAME or folder (or of a zip), or None."""
    for ending in (".tsv", ".txt", ".ts"):
        for place in (folder / name, folder):
            pair = [place / f"{name}_{split}{ending}" for split in ("TRAIN", "TEST")]
            if all(path.is_file() for path in pair):
                return pair


def download(address):
    """Bytes of an address, under a progress bar."""
    with urllib.request.urlopen(address, timeout=30) as response:
        size = response.headers["Content-Length"]
        with tqdm.wrapattr(response, "read", total=size and int(size), desc=address) as body:
            # of a download cut short the zip's directory is missing, which is at its end
            return b"".join(iter(lambda: body.read(1 << 16), b""))


def fetch(name, folder):
    """Download NAME.zip, put its NAME_TRAIN and NAME_TEST into folder/NAME, return their paths."""
    for place in (folder / name, folder):
        for path in place.glob("*_T*"):
            if path.name.startswith((f"{name}_TRAIN", f"{name}_TEST")):  # a user's is kept
                raise Refused(f"{path}: there, but not both {name}_TRAIN and {name}_TEST, of .tsv, "
                              ".txt or .ts; complete or rename them, or move this for a download")
    if Path(name).name != name or Path(name).suffix:  # no path of a user goes into an address
        raise Refused(f"{name}: neither an .npz nor a UCR name without folder or ending; give one")
    failures = []
    for address in (mirror.format(name) for mirror in MIRRORS):
        try:
            pair = locate(name, zipfile.Path(io.BytesIO(download(address))))
            if not pair:
                raise ValueError(f"the zip holds no {name}_TRAIN and {name}_TEST")
            members = {path.name: path.read_bytes() for path in pair}
        except Exception as error:  # of the connection or of the zip, by many names
            failures.append(f"{address} ({str(error) or type(error).__name__})")
            continue
        for member, content in members.items():
            write(folder / name / member, content)
        return locate(name, folder)
    raise Refused(
        f"no {name}_TRAIN and {name}_TEST (.tsv, .txt or .ts) in {folder / name} or {folder}, and "
        f"no download from {' or '.join(failures)}; check the name, put both files there by hand, "
        "or save data of your own as .npz"
    )


# ---- from files to tensors ----------------------------------------------------------------------


def trim(series):
    """A series (C,l) without its NaN tail, the mark of a shorter series in a padded file."""
    return series[:, : np.flatnonzero(np.isfinite(series).any(0)).max(initial=-1) + 1]


def to_tensor(series, where, C, L):
    """A split's trimmed (C,l) series -> (B,C,L): gaps filled, resampled to L, both linearly."""
    x, t = np.empty((len(series), C, L)), np.linspace(0, 1, L)
    for i, one in enumerate(series):
        present = np.isfinite(one)
        if len(one) != C or not present.any(1).all():
            raise Refused(f"{where} series {i + 1}: {len(one)} channels, {present.any(1).sum()} of "
                          f"them with values, expected {C} as in the first of train; remove or "
                          "complete it")
        own_t = np.linspace(0, 1, one.shape[1])
        x[i] = [np.interp(t, own_t[known], row[known]) for row, known in zip(one, present)]
    n_resampled = sum(one.shape[1] != L for one in series)
    n_filled = sum(bool(np.isnan(one).any()) for one in series)
    if n_resampled or n_filled:
        print(f"{where}: {n_resampled} series resampled to {L}, {n_filled} with gaps filled")
    return torch.from_numpy(x)


def encode_labels(train, test, where, device):
    """Class names -> classes, sorted (as numbers if all are), and tensors of 0..n-1, or None.

    Refused where one split has none, or the test split a class that training has not seen.
    """
    if (train is None) != (test is None):
        raise Refused(f"{where}: labels of one split only; give them for both or for neither")
    if train is None:
        return [], None, None
    try:
        classes = sorted(set(train), key=to_float)
    except ValueError:  # words
        classes = sorted(set(train))
    if unseen := sorted(set(test) - set(classes)):
        raise Refused(f"{where}: {len(unseen)} test labels {unseen[:9]} do not occur in the "
                      f"training split, which has {len(classes)}: {classes[:9]}; mend or remove "
                      "these series")
    y_train, y_test = ([classes.index(name) for name in split] for split in (train, test))
    return classes, torch.tensor(y_train, device=device), torch.tensor(y_test, device=device)


def read(name, folder):
    """(series, class names) of train, the same of test, and the digest of a data set by name."""
    if name == "synthetic":
        x, y = two_patterns(5000, torch.Generator().manual_seed(0))
        series, labels = list(x.double().numpy()), [str(label + 1) for label in y.tolist()]
        return (series[:1000], labels[:1000]), (series[1000:], labels[1000:]), name
    try:
        if name.lower().endswith(".npz"):
            paths = [Path(name)]
            train, test = (read_npz(paths[0], split) for split in ("train", "test"))
        else:
            paths = locate(name, folder) or fetch(name, folder)
            train, test = (read_ts(p) if p.suffix == ".ts" else read_table(p) for p in paths)
        return train, test, " ".join(hashlib.sha256(p.read_bytes()).hexdigest() for p in paths)
    except OSError as error:
        raise Refused(f"{name}: {error}; check the path and its permissions") from error


def load(name="synthetic", folder="data", device="cpu", expected=None):
    """Data set by name -> Dataset. Refused where it cannot be read right.

    `synthetic`: 1000 + 4000 series of the TwoPatterns process, the same whatever the seed.
    A path that ends in .npz: one's own arrays. Else a UCR set in `folder`, downloaded when absent.
    All series are resampled to the longest training series and scaled, in float64, by the training
    split's mean and standard deviation per channel. expected: the digest that stage 1 has kept.
    """
    (train, y_train), (test, y_test), digest = read(name, Path(folder))
    if expected and digest != expected:
        raise Refused(f"{name} is not the data that stage 1 was trained on; name their place by "
                      "--dataset and --data-dir, or train stage 1 again")
    if len(train) < 2 or not test:
        raise Refused(f"{name}: {len(train)} training, {len(test)} test series; add some, as it "
                      "needs 2 and 1")
    train, test = ([trim(one) for one in split] for split in (train, test))
    C, L = len(train[0]), max(one.shape[1] for one in train)
    if L < 8:
        raise Refused(f"{name}: series of {L} samples; take longer ones, as the STFT needs 8")
    splits = to_tensor(train, f"{name}, train", C, L), to_tensor(test, f"{name}, test", C, L)
    std, mean = (v[:, None] for v in torch.std_mean(splits[0], (0, 2), correction=0))  # (C,1)
    std[splits[0].amax((0, 2)) == splits[0].amin((0, 2))] = 1  # so that a constant channel is 0
    x_train, x_test = (((x - mean) / std).float() for x in splits)
    if not all(v.isfinite().all() for v in (x_train, x_test, std)):
        raise Refused(f"{name}: values beyond fp32 even when scaled; rescale or mend them")
    x_train, x_test, mean, std = (v.to(device) for v in (x_train, x_test, mean, std))
    classes, y_train, y_test = encode_labels(y_train, y_test, name, device)
    return Dataset(x_train, y_train, x_test, y_test, classes, mean, std, digest)


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
    return torch.lerp(x.gather(2, index), x.gather(2, index + 1), (t - left)[:, None].to(x.dtype))


def amplitude_resize(x, deviation=0.2):
    """Multiply each series by one factor from N(1, deviation^2)."""
    return x * (1 + deviation * torch.randn_like(x[:, :1, :1]))


def slice_and_shuffle(x, n_segments=4):
    """Cut each series at random places into n_segments at most; join them in random order."""
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
    """x(t) -> x(t + by), by (B,1) or one int; beyond a border its sample is held."""
    L = x.shape[-1]
    t = (torch.arange(L, device=x.device) + by).clamp(0, L - 1)
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


@contextmanager
def one_line_errors():
    """What a user can mend, and Ctrl-C or SIGTERM, end the script in one line and exit code 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack letters of a path
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except Refused as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(f"{Path(sys.argv[0]).name}: interrupted; in training, --resume goes on from "
                 "the last checkpoint, if there is one")


def number(kind, low, high=math.inf):
    """argparse type for an int or float in [low, high]."""
    def convert(text):
        """The number in text, if it is in range."""
        value = kind(text)
        if not low <= value <= high or value == math.inf:  # NaN fails, too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    convert.__name__ = kind.__name__  # argparse shows it when kind(text) fails
    return convert


def command_line(description, trains):
    """A parser with the flags that all scripts have, and those of the two that train."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("run").add_argument
    add("--run", type=Path, metavar="DIR", help="its folder (None: runs/DATASET-SSL in stage 1, "
        "then the newest below runs)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all random draws")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there")
    if trains:
        add("--epochs", type=number(int, 1), help="length in epochs of n/B steps, not in --steps")
        add("--resume", action="store_true", help="go on from the run's checkpoint")
        add("--save-every", type=number(int, 1), default=1000, metavar="STEPS",
            help="steps between checkpoints")
        add("--eager", action="store_true", help="on CUDA, launch a step's kernels one by one")
    return parser


def begin(seed, device):
    """Seed torch and return the torch device."""
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise Refused("--device cuda: no CUDA device here; use --device cpu")
    torch.manual_seed(seed)
    return torch.device("cuda" if device != "cpu" and has_cuda else "cpu")


def newest_run(file):
    """The folder below runs/ whose `file` was written last."""
    path = max(Path("runs").glob(f"*/{file}"), key=lambda path: path.stat().st_mtime, default=None)
    if path is None:
        raise Refused(f"no runs/*/{file} here; train that stage first, or name its --run")
    print(f"run: {path.parent}")
    return path.parent


def write(path, content):
    """Write bytes, or what content(file) writes, whole or not at all: by renaming a temporary."""
    if callable(content):
        buffer = io.BytesIO()
        content(buffer)
        content = buffer.getbuffer()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as aside:
            temporary = Path(aside, path.name)
            temporary.write_bytes(content)
            temporary.replace(path)
    except OSError as error:
        raise Refused(f"{path}: cannot be written ({error.strerror})") from error


def one_cycle(done):
    """Share of the highest rate after a share `done` of the steps: from .04 up to 1 over the first
    tenth, then down to 0, both by a cosine (Smith and Topin 2019)."""
    if done < 0.1:
        return 0.52 - 0.48 * math.cos(math.pi * done / 0.1)
    return 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9)


def replayed(step, device, eager=False):
    """The step, a function of no arguments, so that on CUDA one launch runs all of its kernels.

    Three calls run as they are; the fourth is captured as a CUDA graph, which is replayed from then
    on. So the step must work on the same tensors at each call and wait for nothing, what Python
    decides in it is decided once, and the tensors that it returns are overwritten by the next call.
    """
    if device.type == "cpu" or eager:
        return step

    def calls():
        """The outputs of step, call by call."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        for _ in range(3):  # real steps, which also set up what a capture may not
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = step()
            torch.cuda.current_stream().wait_stream(stream)
            yield outputs
        try:
            with torch.cuda.graph(graph, stream=stream):
                outputs = step()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise Refused(f"this step can't be captured; use --eager: {error}") from error
        while True:
            graph.replay()
            yield outputs

    return calls().__next__


def record(sums, log, step, path):
    """Append the means of the terms summed since the last record to the log, and write it to path.

    Refused if one is not finite.
    """
    done = log[-1]["step"] if log else 0
    terms = {name: value.item() / (step - done) for name, value in sums.items()}
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if bad:
        raise Refused(f"{', '.join(bad)} not finite in steps {done + 1} to {step}; what "
                      f"{path.parent} holds is kept. Try a lower --lr, or look for outliers")
    log.append({"step": step} | terms)
    write(path, "".join(json.dumps(one) + "\n" for one in log).encode())


def save(path, parts, constants, log, flags):
    """Write a checkpoint of plain types, all that `restore` and `rebuild` need.

    parts: {name: module or optimizer}, kept by their state. constants: the stage, and the like.
    """
    here_only = ("run", "resume", "device", "eager")
    checkpoint = {name: part.state_dict() for name, part in parts.items()} | constants
    checkpoint |= {"log": log, "rng": torch.get_rng_state(),
                   "flags": {k: v for k, v in flags.items() if k not in here_only}}
    if torch.cuda.is_initialized():
        checkpoint["cuda_rng"] = torch.cuda.get_rng_state()
    write(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path, stage):
    """Checkpoint of that stage, on the CPU; plain types only. Refused for any other file."""
    if not path.exists():
        raise Refused(f"{path}: not there; run train_stage{stage}.py first, or see --run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["stage"] == stage:
            return state
        reason = f"it is of stage {state['stage']}"
    except Exception as error:  # what an unpickler raises depends on the bytes
        reason = type(error).__name__
    raise Refused(f"{path}: not a whole stage-{stage} checkpoint of these scripts ({reason})")


def resume(parser, args, path, stage):
    """The flags to go on with, and the checkpoint at `path` if --resume is given, else None.

    Flags not given take the checkpoint's values; those given must agree with it, but for the place
    of the data, whose bytes are compared.
    """
    if not args.resume:
        if path.exists():
            raise Refused(f"{path} exists; go on from it by --resume, or move it away")
        return args, None
    state = load_checkpoint(path, stage)
    parser.set_defaults(**state["flags"])
    args = parser.parse_args()
    for name, value in state["flags"].items():
        if name not in ("dataset", "data_dir") and value != getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} contradicts {value} in "
                         f"{path}")
    return args, state


def restore(state, parts):
    """Load a checkpoint (or None) into its parts by name, and the random state -> its log."""
    if state is None:
        return []
    for name, part in parts.items():  # an optimizer keeps its own rate and device switches
        kept = {k: v for k, v in part.state_dict().items() if k == "param_groups"}
        part.load_state_dict(state[name] | kept)
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])
    return state["log"]


def check_pair(stage1, stage2, run):
    """Refused where stage 2 has learned tokens of another stage 1, or of other data."""
    same_codes = torch.equal(stage1["model"]["quantizer.codebook"], stage2["codebook"])
    if not same_codes or stage1["digest"] != stage2["digest"]:
        raise Refused(f"{run}/stage2.pt: tokens of another stage1.pt; train stage 2 anew")


def rebuild(kind, state, device):
    """The model of a checkpoint, frozen and in eval mode. Refused if its weights do not fit."""
    done, steps = state["log"][-1]["step"], state["flags"]["steps"]
    if done < steps:
        print(f"stage {state['stage']} has done {done} of {steps} steps; --resume finishes it")
    model = kind(**state["arguments"]).to(device)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:  # names the weights
        raise Refused(f"train stage {state['stage']} anew: {error}") from error
    return model.eval().requires_grad_(False)


@torch.no_grad()
def in_batches(function, x):
    """function(x), 100 rows at a time."""
    return torch.cat([function(rows) for rows in x.split(100)])


def report(run, part, metrics):
    """Put a part's metrics (stage1, stage2, samples, imputed) into metrics.json and print them."""
    path = run / "metrics.json"
    try:
        known = dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, ValueError, TypeError):
        raise Refused(f"{path}: not figures of these scripts; move it away") from None
    known[part] = {k: value if math.isfinite(value) else None for k, value in metrics.items()}
    if None in known[part].values():
        print(f"warning: what is not finite is null in {path}; look for outliers")
    write(path, json.dumps(known, indent=2).encode())
    shown = (f"{k} {v}" if isinstance(v, int) else f"{k} {v:.4g}" for k, v in metrics.items())
    print(f"{run} {part}:", ", ".join(shown))
