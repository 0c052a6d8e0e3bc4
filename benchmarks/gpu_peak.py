"""What a GPU can do with SDXL's VAE when nothing else is in the way; `benchmarks.encode_gpu` holds the product to it.

Letters: B images, H rows, W columns, C channels; h and w of latents, N = h * w tokens of the attention, D its size.
"""

import contextlib
import gc
import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Row = dict[str, Any]

VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True,
}  # fmt: skip
"""SDXL's VAE, as its config.json has it."""
SMALL_VAE_CONFIG = VAE_CONFIG | {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "sample_size": 64}
TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "hidden_act": "quick_gelu", "projection_dim": 768,
    },
    "text_encoder_2": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "hidden_act": "gelu", "projection_dim": 1280,
    },
}  # fmt: skip
"""SDXL's: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14."""

MAX_STEP_S, MAX_AUTOTUNE_S = 75.0, 170.0  # a way's compilation included; the rest of a call is for the others
WORTH = 0.99  # a step that costs more than this is not built upon

CATEGORIES = (
    ("layout changes", r"nchwtonhwc|nhwctonchw|transpose|tensortransform"),
    ("norms and pointwise", r"^triton_(poi|red|per)_(?!.*softmax)"),
    ("attention", r"sdpa|fmha|flash|softmax|attention|scaled_dot"),
    ("convolutions", r"conv|fprop|winograd|implicit|cudnn"),
    ("matrix products", r"gemm|nvjet|cutlass|bmm|addmm|::mm|triton_tem"),
)
"""What a kernel is, by its name, the first that fits; all others are norms and pointwise work."""


class Course:
    """What a script on a borrowed GPU has to keep in mind: the time that is left, and the checks that failed."""

    deadline: float
    failed: list[str]

    def left(self) -> float:
        """Seconds until all must be over."""
        return self.deadline - time.monotonic()

    def verify(self, what: str, passed: bool) -> str:
        """Note a check; a failed one makes the whole run fail, at its end."""
        if not passed:
            self.failed.append(what)
        return "ok" if passed else "FAILED"


@dataclass(frozen=True)
class Way:
    """How the bare loop runs the VAE."""

    dtype: torch.dtype = torch.float32
    tf32: bool = False
    channels_last: bool = False
    deterministic: bool = False
    benchmark: bool = False
    products: bool = False
    """Attention as two matrix products and a softmax, instead of `scaled_dot_product_attention`."""
    mode: str = ""
    """Of torch.compile; empty means no compilation."""

    @property
    def text(self) -> str:
        """For people."""
        switches = ("channels_last", "deterministic", "benchmark", "products")
        words = [name.replace("_", " ") for name in switches if getattr(self, name)]
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return ", ".join([dtype, *words, *([f"compile {self.mode}"] if self.mode else [])])


LADDER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("float32, as diffusers runs it", {}),
    ("tf32", {"tf32": True}),
    ("bfloat16", {"dtype": torch.bfloat16, "tf32": False}),
    ("channels last", {"channels_last": True}),
    ("cudnn.benchmark", {"benchmark": True}),
    ("attention as two products", {"products": True}),
    ("torch.compile", {"mode": "default"}),
    ("max-autotune-no-cudagraphs", {"mode": "max-autotune-no-cudagraphs"}),
)
"""Each step is taken upon the fastest way so far."""
PRODUCT_WAYS = {
    "float32": Way(deterministic=True),
    "tf32": Way(tf32=True, channels_last=True, deterministic=True),
    "bfloat16": Way(torch.bfloat16, channels_last=True, deterministic=True),
}
"""`LatentEncoder`'s settings by `encode.vae_dtype`."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in the block after so many seconds, and every 5 s if a library swallows it; may be nested."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before, started = signal.signal(signal.SIGALRM, stop), time.monotonic()
    outer_s, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer_s:
            signal.setitimer(signal.ITIMER_REAL, max(outer_s - (time.monotonic() - started), 0.1), 5.0)


def settle(device: torch.device) -> None:
    """Give back what nobody holds any more, and wait for the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_a_run(run: Callable[[int], object], device: torch.device, seconds: float, warm: int = 2) -> float:
    """Mean seconds of `run(number)` over about `seconds`; by CUDA events on a GPU."""

    def timed(times: int) -> float:
        if device.type != "cuda":
            started = time.perf_counter()
            for number in range(times):
                run(number)
            return time.perf_counter() - started
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for number in range(times):
            run(number)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    timed(warm)
    times = min(max(math.ceil(seconds / max(timed(2) / 2, 1e-6)), 3), 500)
    return timed(times) / times


def matrix_peak(size: int, device: torch.device) -> list[Row]:
    """TFLOP/s of square matrix products of random numbers by type, and the GB/s of a copy (read and write)."""
    rows = []
    for name, dtype in (("float32", torch.float32), ("tf32", torch.float32), ("bfloat16", torch.bfloat16),
                        ("float16", torch.float16)):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = seconds_a_run(lambda _, left=left, right=right: left @ right, device, 0.5, warm=5)
        rows.append({"what": f"{name} product {size}^3", "TFLOP/s": round(2 * size**3 / seconds / 1e12, 3)})
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.randn(size * size * 16, device=device)  # 4 GB at 8192: far more than any cache
    target = torch.empty_like(source)
    seconds = seconds_a_run(lambda _: target.copy_(source), device, 0.3)
    rows.append({"what": "copy", "GB/s": round(2 * source.nbytes / seconds / 1e9, 1)})
    return rows


def flop_an_image(config: Row, side: int) -> dict[str, float]:
    """TFLOP of encoding one image: all, and those of convolutions; counted by torch on tensors without data."""
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        AutoencoderKL(**config).encode(torch.empty(1, 3, side, side))
    of_convolutions = sum(flop for name, flop in counter.get_flop_counts()["Global"].items() if "conv" in str(name))
    return {"all": counter.get_total_flops() / 1e12, "convolutions": of_convolutions / 1e12}


class ProductAttention:
    """A processor of diffusers' `Attention` for the VAE's one head: softmax(q k / sqrt(D)) v in the model's type."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: None = None, attention_mask: None = None,
        temb: None = None,
    ) -> Tensor:  # fmt: skip
        """B, C, h, w to the same; the other arguments are diffusers'."""
        batch, channels, height, width = hidden_states.shape
        tokens_BNC = hidden_states.reshape(batch, channels, height * width).transpose(1, 2)
        tokens_BNC = attn.group_norm(tokens_BNC.transpose(1, 2)).transpose(1, 2)
        query, key, value = attn.to_q(tokens_BNC), attn.to_k(tokens_BNC), attn.to_v(tokens_BNC)
        scores_BNN = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
        out_BNC = attn.to_out[0](torch.bmm(scores_BNN.softmax(-1), value))
        return out_BNC.transpose(1, 2).reshape(hidden_states.shape) + hidden_states


class BareLoop:
    """The VAE's encoder over tensors that lie on the device, scaled and in their type, and nothing else.

    Args:
        folder: Of the VAE.
        way: How it runs.
        device: Where.
        pixels_BHWC: Distinct images, 0..255; batches take them in turn.
        batch_size: Images a pass.
    """

    def __init__(
        self, folder: str, way: Way, device: torch.device, pixels_BHWC: NDArray[np.uint8], batch_size: int
    ) -> None:
        from diffusers import AutoencoderKL

        torch._dynamo.config.recompile_limit = 64  # each loop compiles the same function for a module of its own
        settle(device)
        self._way, self.batch_size, self.device = way, batch_size, device
        self.switch()
        layout = torch.channels_last if way.channels_last else torch.contiguous_format
        vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False)
        del vae.decoder
        self._vae = vae.to(device, way.dtype, memory_format=layout)
        if way.products:
            self._vae.encoder.mid_block.attentions[0].set_processor(ProductAttention())
        if way.mode:
            self._vae.encoder = torch.compile(self._vae.encoder, mode=way.mode, dynamic=False)
        self._batches = []
        for start in range(2):
            chosen = [pixels_BHWC[(start * batch_size + n) % len(pixels_BHWC)] for n in range(batch_size)]
            pixels = torch.from_numpy(np.stack(chosen)).to(device).permute(0, 3, 1, 2).to(torch.float32)
            self._batches.append((2.0 * (pixels / 255.0) - 1.0).to(way.dtype).contiguous(memory_format=layout))

    def switch(self) -> None:
        """Set torch's switches, which are the process's, to this way."""
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self._way.tf32
        torch.backends.cudnn.deterministic = self._way.deterministic
        torch.backends.cudnn.benchmark = self._way.benchmark

    @torch.no_grad()
    def run(self, number: int) -> Tensor:
        """One pass."""
        return self._vae.encode(self._batches[number % len(self._batches)]).latent_dist.mean

    def measure(self, seconds: float) -> Row:
        """Images a second, and the memory it took."""
        for number in range(3):  # compiles, and lets cuDNN try what it has; that memory is not the loop's
            self.run(number)
        settle(self.device)
        images_per_s = self.batch_size / seconds_a_run(self.run, self.device, seconds)
        memory = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0
        return {"images/s": round(images_per_s, 2), "memory GB": round(memory, 2)}


def attention_rows(batch: int, tokens: int, size: int, device: torch.device) -> list[Row]:
    """The middle block's attention by itself, by what computes it; one head of 512 is more than flash takes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = torch.randn(3, batch, 1, tokens, size, device=device, dtype=torch.bfloat16)
    backends = {"chosen by torch": None, "flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
                "memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip

    def attend(_: int, backend: Any) -> Tensor:
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            return functional.scaled_dot_product_attention(query, key, value)

    def products(_: int) -> Tensor:
        return (query * size**-0.5 @ key.transpose(-1, -2)).softmax(-1) @ value

    runs = {name: partial(attend, backend=backend) for name, backend in backends.items()} | {"two products": products}
    rows = []
    for name, run in runs.items():
        settle(device)
        try:
            with at_most(20), torch.no_grad():
                seconds = seconds_a_run(run, device, 0.3)
        except Exception as error:  # a backend that refuses this shape, or has no memory for it
            rows.append({"attention": name, "note": first_line(error)})
            continue
        rate = round(4 * batch * tokens**2 * size / 1e12 / seconds, 2)
        rows.append({"attention": name, "ms an image": round(1000 * seconds / batch, 3), "TFLOP/s": rate})
    return rows


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a table."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:90]


class Steps:
    """The bare loop step by step, each against the latents of the first; remembers the fastest way and its loop.

    Args:
        make: A bare loop of a way and a batch size.
        tera_flop: Of one image.
        peak: TFLOP/s of bfloat16 products on this device.
        seconds: How long each way is timed.
        left: Seconds until all must be over.
    """

    def __init__(
        self, make: Callable[[Way, int], BareLoop], tera_flop: float, peak: float, seconds: float,
        left: Callable[[], float],
    ) -> None:  # fmt: skip
        self._make, self._tera_flop, self._peak, self._seconds, self._left = make, tera_flop, peak, seconds, left
        self._first_CHW: Tensor | None = None
        self.best: tuple[Way, float, BareLoop] | None = None

    def row(self, name: str, way: Way, batch_size: int) -> Row:
        """Measure one way; what it raises becomes a note."""
        limit = min(MAX_AUTOTUNE_S if "autotune" in way.mode else MAX_STEP_S, self._left())
        started = time.monotonic()
        row: Row = {"step": name, "batch": batch_size}
        if limit < 5 or (way.mode and not torch.cuda.is_available()):
            return row | {"note": "no time left" if limit < 5 else "needs a GPU"}
        try:
            with at_most(limit):
                loop = self._make(way, batch_size)
                row |= loop.measure(self._seconds)
                image_CHW = loop.run(0)[0].float()  # the same image whatever the batch is
        except Exception as error:  # out of memory or time, or a compiler that fails: a row of the table all the same
            return row | {"note": first_line(error)}
        self._first_CHW = image_CHW if self._first_CHW is None else self._first_CHW
        rate, error = row["images/s"], float((image_CHW - self._first_CHW).abs().max())
        if self.best is None or rate > self.best[1]:
            self.best = (way, rate, loop)
        tera = rate * self._tera_flop
        row |= {"TFLOP/s": round(tera, 3), "of peak": round(tera / self._peak, 3), "error": f"{error:.1e}"}
        return row | {"took s": round(time.monotonic() - started, 1)}

    def ladder(self, batch_size: int) -> Iterator[Row]:
        """Every step upon the fastest way so far; then what repeatable bytes cost, as the product asks for them."""
        base, fastest = Way(), 0.0
        for name, change in LADDER:
            way = replace(base, **change)
            row = self.row(name, way, batch_size)
            if row.get("images/s", 0.0) >= WORTH * fastest:
                base, fastest = way, max(fastest, row.get("images/s", 0.0))
            else:
                row["note"] = row.get("note", "slower: not built upon")
            yield row
        ways = {f"the product's {name}": way for name, way in PRODUCT_WAYS.items()}
        ways["its bfloat16 + cudnn.benchmark"] = replace(PRODUCT_WAYS["bfloat16"], benchmark=True)
        ways["its bfloat16 + torch.compile"] = replace(PRODUCT_WAYS["bfloat16"], mode="default")
        for name, way in ways.items():
            yield self.row(name, way, batch_size)

    def batches(self, way: Way, sizes: Sequence[int]) -> Iterator[Row]:
        """One way by batch size; tuned kernels would be tuned for each, so compiled ones are taken."""
        way = replace(way, mode="default") if way.mode else way
        for size in sizes:
            yield self.row(f"batches: {way.text}", way, size)


def category(kernel: str) -> str:
    """What a kernel does: see CATEGORIES."""
    return next((name for name, pattern in CATEGORIES if re.search(pattern, kernel.lower())), "norms and pointwise")


def profile(loop: BareLoop, tera_flop: dict[str, float], peak: float, num_passes: int = 5) -> Row:
    """Where a bare loop's time goes: the longest kernels, the share of each kind of work, and what limits it."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    on_gpu = loop.device.type == "cuda"
    loop.switch()
    loop.run(0)
    settle(loop.device)
    wall_s = seconds_a_run(loop.run, loop.device, 0.5, warm=1) * num_passes
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for number in range(num_passes):
            loop.run(number)
        settle(loop.device)
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [
        event
        for event in profiler.key_averages()
        if (event.device_type == DeviceType.CUDA) == on_gpu and not event.is_user_annotation
    ]
    found = [(event.key, getattr(event, attribute) / 1e6, event.count) for event in kernels]
    found = sorted((each for each in found if each[1] > 0), key=lambda each: -each[1])
    total = sum(seconds for _, seconds, _ in found)
    shares: dict[str, float] = {}
    for kernel, seconds, _ in found:
        shares[category(kernel)] = shares.get(category(kernel), 0.0) + seconds / total
    images = num_passes * loop.batch_size
    top = [
        {"kernel": kernel[:72], "kind": category(kernel), "share": round(seconds / total, 3),
         "ms an image": round(1000 * seconds / images, 4), "calls": count}
        for kernel, seconds, count in found[:10]
    ]  # fmt: skip
    of_convolutions = tera_flop["convolutions"] * images / max(shares.get("convolutions", 0.0) * total, 1e-9)
    text = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))
    ceiling = tera_flop["all"] * images / total / peak / max(1e-9, 1 - shares.get("norms and pointwise", 0.0))
    limit = (
        f"kernels take {1000 * total / images:.2f} ms an image of {1000 * wall_s / images:.2f} ms: {text}. The "
        f"convolutions run at {of_convolutions:.3g} TFLOP/s, {of_convolutions / peak:.0%} of the peak; without norms "
        f"and pointwise work the loop would reach {ceiling:.0%} of it; the most goes to {max(shares, key=shares.get)}."  # type: ignore[arg-type]
    )
    return {"shares": {name: round(share, 4) for name, share in shares.items()}, "top": top, "limit": limit}
