"""`distkv stress`: real runs on small shapes, and the ways in which it verifies them."""

import json
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from support.checkpoints import save_llama

import distkv.stress.stress
from distkv.commands import main as cli
from distkv.config import EngineConfig
from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineRequest, RequestFailed, StepOutput
from distkv.engine.stats import EngineStats
from distkv.errors import StoreError
from distkv.launch.launch import launch
from distkv.models.shapes import SHAPES, shape_folder
from distkv.sampling_params import SamplingParams
from distkv.storage.moving.staging_ring import LoadsInTurn
from distkv.stress.stage import Sample, run_stage
from distkv.stress.view import StressView
from distkv.workers.model.model_config import ModelConfig

Stress = Callable[..., tuple[int, str, str]]

# pages of 32 KiB: 8 on the device, 16 on the host beside 16 for reading ahead, and a disk for the rest
WINDOW = ("--device-kv-bytes", "256KiB", "--host-kv-bytes", "1MiB", "--page-size", "64")
TINY = ("--shape", "tiny", "--context", "4096", *WINDOW)


@pytest.fixture
def stress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Stress:
    """`distkv stress` in this process: exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["distkv", "stress", *arguments])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def spoil_streaming(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.Tensor], object]) -> None:
    """Has `spoil` change what the first load of every step brings for layer 0: `[pages, 2, head, token, dim]`."""
    take = LoadsInTurn.take

    def spoilt(self: LoadsInTurn) -> torch.Tensor:
        pages = take(self)
        if self._taken == 1:
            spoil(pages)
        return pages

    monkeypatch.setattr(LoadsInTurn, "take", spoilt)


def spoil_exponent_byte(pages: torch.Tensor) -> None:
    """One value of the last page becomes some 2^33. Which page that is depends on how far transfers have come, and with
    a bit flipped some values would be so large that logits overflow, which is another error."""
    pages.view(torch.uint8)[-1, 1, 0, 5, 7] = 0x50  # little-endian bfloat16: bytes 1, 3, 5, ... hold exponents


def zero_a_page(pages: torch.Tensor) -> None:
    pages[-1] = 0


def test_a_run_over_all_tiers_is_measured_and_verified(stress: Stress, tmp_path: Path) -> None:
    cache, figures, picture = tmp_path / "cache", tmp_path / "figures.json", tmp_path / "picture.png"
    code, out, err = stress(
        *TINY, "--cache-dir", str(cache), "--new-tokens", "8", "--verify", "--json", str(figures), "--plot",
        str(picture),
    )  # fmt: skip
    assert code == 0, out + err
    verdict = out.strip().splitlines()[-1]
    assert verdict == "verified: 32 tokens and 3232 log-probabilities equal the all-resident run's bit for bit"
    assert [path.name for path in (cache / "scratch").iterdir()] == ["lock"]  # the pages are gone
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    report = json.loads(figures.read_text())
    assert report["engine"]["kv_bytes_per_token"] == 512 and report["engine"]["page_bytes"] == 512 * 64
    assert report["options"]["context"] == 4096 and report["shape"]["dtype"] == "bfloat16"
    assert report["verification"]["passed"] and report["peak_rss_bytes"] > 2**20
    assert [stage["context"] for stage in report["stages"]] == [512, 1024, 2048, 4096]
    for stage in report["stages"]:
        assert len(stage["token_ids"]) == 8 and len(stage["decode_ms_per_token"]["all"]) == 7
        assert stage["pages"]["in_use"] == stage["context"] // 64 + 1
        assert stage["bytes"]["device"] == stage["pages"]["device"] * 512 * 64
        assert stage["streamed_bytes_per_step"] == stage["expected_streamed_per_step"]
        times = [sample["seconds"] for sample in stage["samples"]]
        assert times == sorted(times)
    last = report["stages"][-1]
    assert last["pages"]["device"] == 8 and last["pages"]["disk"] >= 65 - 8 - 24
    assert last["streamed_bytes_per_step"] == (65 - 8) * 512 * 64
    assert last["moved_bytes"]["disk_streamed"] > 0 < last["moved_bytes"]["host_streamed"]


@pytest.mark.parametrize("codec, token", [("int8", 2 * 2 * 66), ("int4", 2 * 2 * 36)])
def test_codes_are_counted_and_verified(stress: Stress, tmp_path: Path, codec: str, token: int) -> None:
    """64 numbers of a head with their scales, in keys and values of two layers; the disk's tier has the rest."""
    figures = tmp_path / "figures.json"
    code, out, err = stress(
        "--shape", "tiny", "--context", "2048", "--page-size", "64", "--device-kv-bytes", "256KiB", "--kv-cache-dtype",
        codec, "--host-kv-bytes", str(20 * 64 * token), "--cache-dir", str(tmp_path), "--new-tokens", "4", "--verify",
        "--json", str(figures),
    )  # fmt: skip
    assert code == 0 and "equal the all-resident run's bit for bit" in out, out + err
    assert "of scales) * cold tokens" in out
    [stage] = json.loads(figures.read_text())["stages"]
    assert stage["bytes"]["device"] == stage["pages"]["device"] * 64 * 512
    for tier in ("host", "disk"):
        assert stage["bytes"][tier] == stage["pages"][tier] * 64 * token > 0
    assert stage["streamed_bytes_per_step"] == stage["expected_streamed_per_step"] == stage["cold_tokens"] * token > 0


def test_what_a_policy_reads_is_told_and_verified(stress: Stress, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    code, out, err = stress(
        "--shape", "tiny", "--context", "2048", "--page-size", "64", "--device-kv-bytes", "256KiB", "--host-kv-bytes",
        "4MiB", "--new-tokens", "4", "--attention-policy", "top_pages(share=0.25)", "--attention-audit", "1",
        "--verify", "--json", str(figures),
    )  # fmt: skip
    assert code == 0 and "equal the all-resident run's bit for bit" in out, out + err
    [stage] = json.loads(figures.read_text())["stages"]
    assert stage["share_chosen"] == 9 / 33 and 0.1 < stage["mean_covered"] < 0.5, "random KV"
    assert re.search(r"pages chosen *│ 27.3% ", out) and re.search(rf"attention .* {stage['mean_covered']:.1%} ", out)
    # each step reads all of it once for the audit, and again what is chosen
    assert stage["expected_streamed_per_step"] < stage["streamed_bytes_per_step"]


def test_one_stage_without_tiers_or_verification(stress: Stress) -> None:
    code, out, _ = stress("--shape", "tiny", "--context", "300", "--new-tokens", "3", "--device-kv-bytes", "1MiB")
    assert code == 0
    assert "not verified" in out.strip().splitlines()[-1]
    assert re.search(r"stream B/token *│ 0 ", out)


def test_one_wrong_byte_is_found(stress: Stress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_streaming(monkeypatch, spoil_exponent_byte)
    figures = tmp_path / "figures.json"
    code, out, _ = stress(*TINY, "--new-tokens", "4", "--cache-dir", str(tmp_path), "--verify", "--json", str(figures))
    assert code == 1
    assert re.match(r"WRONG: token \d after 4096 tokens differs", out.strip().splitlines()[-1])
    assert json.loads(figures.read_text())["verification"]["passed"] is False


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_reference_agrees_and_finds_a_missing_page(
    stress: Stress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(distkv.stress.stress, "_free_bytes", lambda config: 0)  # no room for an all-resident run
    arguments = (
        "--shape", "tiny", "--context", "4000", "--page-size", "64", "--device-kv-bytes", "512KiB", "--host-kv-bytes",
        "2MiB", "--cache-dir", str(tmp_path), "--new-tokens", "4", "--dtype", dtype, "--verify",
    )  # fmt: skip
    code, out, _ = stress(*arguments)
    assert code == 0 and out.strip().splitlines()[-1].startswith("verified: float64 reference, largest error"), out
    spoil_streaming(monkeypatch, zero_a_page)
    code, out, _ = stress(*arguments)
    assert code == 1 and out.strip().splitlines()[-1].startswith("WRONG: float64 reference"), out


@pytest.mark.parametrize(
    "shape",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ],
)
def test_the_reference_reads_checkpoints(
    stress: Stress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
) -> None:
    folder, _ = save_llama(tmp_path / "model", **shape)
    monkeypatch.setattr(distkv.stress.stress, "_free_bytes", lambda config: 0)
    code, out, _ = stress(
        "--model", str(folder), "--fill", "random", "--context", "250", "--page-size", "16", "--new-tokens", "6",
        "--device-kv-bytes", "1MiB", "--verify",
    )  # fmt: skip
    assert code == 0 and "verified: float64 reference" in out, out


def test_prefill_of_a_model(stress: Stress, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (
        "--model", str(tiny_model), "--context", "240", "--page-size", "16", "--new-tokens", "4", "--verify",
        "--device-kv-bytes", "48KiB", "--host-kv-bytes", "560KiB", "--cache-dir", str(tmp_path),
        "--max-num-batched-tokens", "64",
    )  # fmt: skip
    code, out, err = stress(*arguments)
    assert code == 0 and "bit for bit" in out, out + err
    monkeypatch.setattr(distkv.stress.stress, "_free_bytes", lambda config: 1000)
    code, _, err = stress(*arguments)
    assert code == 2 and "--fill random" in err
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["lock"]


def test_a_model_with_a_tokenizer_reads_text(demo_model: Path) -> None:
    from distkv.frontend.tokenizer import Tokenizer

    tokenizer = Tokenizer(demo_model)
    token_ids = distkv.stress.stress._text(tokenizer, 500)
    assert len(token_ids) == 500 and "import" in tokenizer.decode(token_ids)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_models(name: str) -> None:
    with shape_folder(name) as folder:
        model = ModelConfig.load(folder)
        assert model.dtype == "bfloat16"
    assert not folder.exists()
    per_token = {"tiny": 512, "small": 4096, "llama-3.2-1b": 2**15, "llama-3-8b": 2**17, "llama-3-70b": 5 * 2**16}
    assert 4 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim == per_token[name]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), ("--model", "--shape")),
        (("--shape", "tiny", "--model", "/x"), ("exactly one",)),
        (("--shape", "huge"), ("huge", "tiny", "llama-3-70b")),
        (("--shape", "tiny", "--fill", "zero"), ("zero", "random")),
        (("--shape", "tiny", "--new-tokens", "1"), ("--new-tokens",)),
        (("--shape", "tiny", "--context", "0"), ("--context",)),
        (("--shape", "tiny", "--json", "/no/such/folder/x.json"), ("/no/such/folder/x.json",)),
        (("--shape", "tiny", "--plot", "/no/such/folder/x.png"), ("/no/such/folder/x.png",)),
        (("--shape", "tiny", "--plot", "/tmp/x.jpg"), (".png",)),
        (("--shape", "tiny", "--seed", "-1"), ("seed",)),
        (
            ("--shape", "tiny", "--device-kv-bytes", "1MiB", "--host-kv-bytes", "0", "--stages", "9"),
            ("the tiers hold 8",),
        ),
        (("--model", "MODEL", "--context", "300"), ("max_model_len", "256")),
    ],
)
def test_nonsense_is_refused_in_one_line(
    stress: Stress, tiny_model: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    code, out, err = stress(*(str(tiny_model) if argument == "MODEL" else argument for argument in arguments))
    assert code == 2 and out == ""
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err


def test_an_interrupt_closes_the_engine(stress: Stress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        assert (tmp_path / "scratch" / "kv.zarr").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(distkv.stress.stress, "run_stage", interrupted)
    code, _, _ = stress(*TINY, "--cache-dir", str(tmp_path))
    assert code == 130
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["lock"]


class SelfRunning:
    """Runs as an engine on a cluster does: a step for each question, and `step` waits for a token."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._unread: deque[list[StepOutput]] = deque()
        self.info = engine.info
        self.add, self.abort, self.close = engine.add, engine.abort, engine.close

    def step(self) -> list[StepOutput]:
        while not self._unread:
            self.stats()
        return self._unread.popleft()

    def stats(self) -> EngineStats:
        if self._engine.has_work and (outputs := self._engine.step()):
            self._unread.append(outputs)
        return self._engine.stats()


def test_an_engine_that_runs_by_itself_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("distkv.stress.stage.CALM_SECONDS", 0)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=5, logprobs=3)
    request = EngineRequest("one", [7] * 3000, params, 5, 0, synthetic_kv_seed=1)
    watched: list[Sample] = []
    with shape_folder("tiny") as folder:
        options: Any = {"max_model_len": 3005, "max_num_seqs": 1, "max_num_batched_tokens": 256, "page_size": 64}
        engine = launch(EngineConfig(folder, device_kv_bytes="2MiB", host_kv_bytes=0, load_format="dummy", **options))
    assert isinstance(engine, Engine)
    stage = run_stage(SelfRunning(engine), request, watched.append)
    engine.close()
    assert len(stage.outputs) == 5 and len(stage.decode_ms) == 4
    assert stage.full.pages_in_use == 47
    assert len({sample.tokens for sample in watched if not sample.new_tokens}) > 5  # the fill was seen
    assert [sample.new_tokens for sample in stage.samples if sample.new_tokens] == [1, 2, 3, 4, 5]


def test_a_request_that_fails_raises_its_error() -> None:
    class Failing:
        info = SimpleNamespace(page_size=16)

        def add(self, requests: list[EngineRequest]) -> None: ...

        def stats(self) -> EngineStats:
            return EngineStats(0, 0, 0, 0)

        def step(self) -> list[StepOutput]:
            return [RequestFailed("one", "StoreError", "the disk is on fire")]

    request = EngineRequest("one", [7] * 30, SamplingParams(), 5, 0)
    engine: Any = Failing()
    with pytest.raises(StoreError, match="on fire"):
        run_stage(engine, request, lambda sample: None)


def test_the_view_shows_no_rate_of_the_fill_for_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seconds: float, tokens: int, new_tokens: int, spilled: int) -> Sample:
        pages = {"device": 1, "host": 0, "disk": 0}
        return Sample(seconds, tokens, new_tokens, not new_tokens, 1, pages, {"device_to_host": spilled})

    info: Any = SimpleNamespace(num_pages=8, num_host_pages=0, num_disk_pages=0, page_bytes=64)
    with StressView(Console(), info) as view:
        view.stage(1000, 3)
        view.watch(sample(0.0, 0, 0, 0))
        view.watch(sample(10.0, 1000, 0, 10**10))
        view.watch(sample(10.1, 1001, 1, 10**10))
        view.watch(sample(15.2, 1003, 3, 10**10))
    assert capsys.readouterr().out.splitlines() == [
        "context 1000: fill 1000/1000 tokens, 10 ms per token; device 1/8 pages; device_to_host 1.00 GB/s",
        "context 1000: decode 1/3 tokens; device 1/8 pages",
        "context 1000: decode 3/3 tokens, 2.55e+03 ms per token; device 1/8 pages; nothing moves",
    ]


def test_a_seed_that_nothing_depends_on_is_refused(stress: Stress, demo_model: Path) -> None:
    code, _, err = stress("--model", str(demo_model), "--seed", "3")
    assert code == 2 and "--seed has no part" in err


def test_no_tokens_in_a_step_are_not_taken_for_the_default(stress: Stress) -> None:
    code, _, err = stress("--shape", "tiny", "--max-num-batched-tokens", "0")
    assert code == 2 and "--max-num-batched-tokens" in err
