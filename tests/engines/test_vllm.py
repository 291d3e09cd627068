"""vLLM's command line, environment, log and metrics, as its versions 0.32 and 0.33 have them."""

from dataclasses import replace
from pathlib import Path

import pytest

from appliance.catalog import load_catalog
from appliance.engines.base import EngineMemory, EngineShape, GpuShare, Placement
from appliance.engines.vllm import InstalledVllm, Vllm, parse_settings
from appliance.engines.vllm_flags import filter_known_options, find_parsers, read_version
from appliance.engines.vllm_log import find_crash_reason, parse_progress
from appliance.engines.vllm_metrics import VllmMetrics
from appliance.errors import BackendGarbage

FOLDER = Path("/opt/vllm")
ENGINE = Vllm(InstalledVllm(FOLDER, "0.32.0"), Path("/var/cache/vllm"), cpus=(2, 3))
CPU = Placement(
    model="m",
    variant="bf16",
    engine="vllm",
    path=Path("/models/m"),
    shape=EngineShape(2, 16_384, 32, 8192, 64),
    memory=EngineMemory(269_000_000, 2 << 30, 0, 0),
    abilities=frozenset({"chat", "completions"}),
    reasons=(),
)
SHARE = GpuShare(("GPU-1", "GPU-2"), 0.45, 40 << 30, 8192, tensor_parallel=2)
GPU = replace(CPU, gpu=SHARE, settings=(("--enable-sleep-mode", ""), ("--dtype", "float16")))


def _options(engine: Vllm, placement: Placement) -> dict[str, str]:
    argv = engine.build_argv("python3", placement, socket=Path("/run/0/s"), parent_guard_fd=7, drain_seconds=30)
    end = argv.index("--")
    assert argv[: end + 1] == [
        *("python3", "-m", "appliance.node.supervise.parent_guard", "--fd", "7"),
        *("--without", "PYTHONPATH", "--path", "/opt/vllm/bin", "--"),
    ]
    assert argv[end + 1 : end + 5] == ["/opt/vllm/bin/python", "/opt/vllm/bin/vllm", "serve", "/models/m"]
    return dict(parse_settings(argv[end + 5 :]))


def test_2_12_and_13_the_command_line_bounds_its_queue_drains_and_holds_no_key() -> None:
    assert _options(ENGINE, CPU) == {
        "--uds": "/run/0/s",
        "--served-model-name": "m",
        "--max-model-len": "8192",
        "--max-num-seqs": "32",
        "--max-num-queued-reqs": "96",
        "--max-num-queued-tokens": "196608",
        "--scheduling-policy": "priority",
        "--enable-prefix-caching": "",
        "--enable-prompt-tokens-details": "",
        "--generation-config": "vllm",
        "--disable-uvicorn-access-log": "",
        "--shutdown-timeout": "25",
        "--kv-cache-memory-bytes": str(2 << 30),
        "--stream-interval": "1",
    }
    assert ENGINE.key_variable == "VLLM_API_KEY"


def test_on_gpus_it_is_told_its_share_and_the_operators_options_win() -> None:
    options = _options(ENGINE, GPU)
    assert options["--gpu-memory-utilization"] == "0.45"
    assert options["--kv-cache-memory-bytes"] == str(40 << 30)
    assert (options["--tensor-parallel-size"], options["--max-num-batched-tokens"]) == ("2", "8192")
    assert options["--dtype"] == "float16" and "--enable-sleep-mode" in options
    variables = ENGINE.build_environment(GPU, Path("/run/0"))
    assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-2"
    assert variables["VLLM_SERVER_DEV_MODE"] == "1" and ENGINE.can_sleep(GPU)


def test_8_its_environment_keeps_it_offline_quiet_and_in_its_folder() -> None:
    variables = ENGINE.build_environment(CPU, Path("/run/0"))
    assert variables["VLLM_RPC_BASE_PATH"] == "/run/0"
    assert variables["HF_HUB_OFFLINE"] == variables["VLLM_NO_USAGE_STATS"] == "1"
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"
    assert variables["CUDA_VISIBLE_DEVICES"] == ""
    assert "VLLM_PORT" not in variables and "VLLM_SERVER_DEV_MODE" not in variables


def test_a_model_that_only_embeds_is_run_for_that_and_never_probed() -> None:
    pooling = replace(CPU, abilities=frozenset({"embeddings"}))
    assert _options(ENGINE, pooling)["--runner"] == "pooling"
    assert ENGINE.build_liveness_probe(pooling) is None and ENGINE.build_liveness_probe(CPU) is not None


@pytest.mark.parametrize(
    ("version", "given", "kept"),
    [
        ("0.32.0", "--disable-log-requests", False),
        ("0.33.0", "--disable-log-requests", True),
        ("0.33.0", "--swap-space", False),
        ("0.26.0", "--max-num-queued-reqs", False),
        ("0.32.0+cpu", "--max-num-queued-reqs", True),
        ("0.32.0", "--no-enable-prefix-caching", True),
    ],
)
def test_15_versions_are_told_only_what_they_know(version: str, given: str, kept: bool) -> None:
    assert (given in filter_known_options({given: ""}, read_version(version))) is kept


@pytest.mark.parametrize(
    ("family", "name", "tools", "reasoning"),
    [
        ("qwen3", "qwen3-8b", "hermes", "qwen3"),
        ("qwen3", "qwen3-coder-30b-a3b-instruct", "qwen3_coder", None),
        ("qwen2.5", "qwen2.5-7b-instruct", "hermes", None),
        ("gpt-oss", "gpt-oss-20b", "openai", "openai_gptoss"),
        ("llama", "llama-3.3-70b-instruct", "llama3_json", None),
        ("mistral", "mistral-small-3.2-24b-instruct", "mistral", None),
        ("phi", "phi-4", None, None),
    ],
)
def test_families_have_their_parsers(family: str, name: str, tools: str | None, reasoning: str | None) -> None:
    found = dict(find_parsers(family, name))
    assert (found.get("--tool-call-parser"), found.get("--reasoning-parser")) == (tools, reasoning)
    assert ("--enable-auto-tool-choice" in found) is (tools is not None)


def test_what_it_can_do_with_a_model_that_writes() -> None:
    assert ENGINE.list_abilities(load_catalog().embedded) >= {"labels", "token_logprobs", "json_schema", "chat"}


def test_memory_of_the_kv_cache_is_what_it_measured_itself() -> None:
    """SmolLM2-135M: 93,184 tokens in 2 GiB, as its log says."""
    model = load_catalog().embedded
    memory = ENGINE.estimate_memory(model, model.variants[0], context_tokens=93_184, sequences=8)
    assert memory.kv_bytes == pytest.approx(2 << 30, rel=0.002)


LOG = """\
(APIServer pid=1) INFO 11-20 08:14:39 [api_utils.py:286] non-default args: {'uds': '/run/0/s'}
(APIServer pid=1) INFO 11-20 08:15:07 [model.py:733] Resolved architecture: LlamaForCausalLM
(APIServer pid=1) WARNING 11-20 08:15:08 [vllm.py:1703] Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT
(EngineCore pid=2) INFO 11-20 08:15:30 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='m'
(Worker pid=3) INFO 11-20 08:15:50 [cpu_model_runner.py:68] Starting to load model /models/m...
Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:01<00:01,  1.63s/it]
(Worker pid=3) INFO 11-20 08:15:52 [default_loader.py:501] Loading weights took 1.64 seconds
(EngineCore pid=2) INFO 11-20 08:15:55 [kv_cache_utils.py:2327] CPU KV cache size: 46,592 tokens, Maximum concurrency
(EngineCore pid=2) INFO 11-20 08:15:59 [core.py:402] init engine (profile, create kv cache, warmup model) took 3.79 s
(APIServer pid=1) INFO 11-20 08:16:02 [entry.py:140] Starting vLLM server on unix:/run/0/s
""".splitlines()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (0, ""),
        (1, "reading its arguments"),
        (3, "reading the model's configuration (LlamaForCausalLM)"),
        (4, "starting its engine process"),
        (6, "loading weights: 50 % (1 of 2 files)"),
        (7, "weights loaded in 1.64 s"),
        (8, "KV cache of 46,592 tokens made"),
        (9, "engine initialised in 3.79 s"),
        (10, "opening its socket"),
    ],
)
def test_its_log_tells_how_far_a_start_is(lines: int, said: str) -> None:
    assert parse_progress(LOG[:lines]) == said


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            [
                "(Worker pid=3) ERROR 11-20 08:15:52 [multiproc_executor.py:9] Traceback (most recent call last):",
                "(Worker pid=3) ERROR 11-20 08:15:52 [multiproc_executor.py:9] torch.OutOfMemoryError: CUDA out of "
                "memory. Tried to allocate 2.00 GiB.",
                "(EngineCore pid=2) ERROR 11-20 08:15:53 [core.py:9] RuntimeError: Worker failed with error",
                "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
            ],
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (["usage: vllm serve [model_tag] [options]", "vllm serve: error: unrecognized arguments: --x"], "unrecognized"),
        (
            ["Traceback (most recent call last):", "OSError: [Errno 98] Address already in use"],
            "OSError: [Errno 98] Address already in use",
        ),
        (["(APIServer pid=1) INFO 11-20 08:16:02 [entry.py:140] Shutting down"], "Shutting down"),
        ([], ""),
    ],
)
def test_14_its_last_words_are_the_root_cause(lines: list[str], words: str) -> None:
    assert find_crash_reason(lines).startswith(words)


@pytest.mark.parametrize(
    "words",
    [
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "ValueError: No available memory for the cache blocks. Try increasing gpu_memory_utilization",
        "ValueError: Free memory on device cuda:0 (10/140 GiB) is less than desired GPU memory utilization (0.92)",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_short_memory_leads_to_a_smaller_placement_until_nothing_useful_is_left(words: str) -> None:
    less = ENGINE.shrink_placement(GPU, words)
    assert less is not None and less.gpu is not None
    assert less.gpu.kv_cache_bytes == 30 << 30 and less.gpu.memory_utilization == pytest.approx(0.4)
    assert (less.shape.sequences, less.shape.context_tokens) == (16, 12_288)
    steps = 0
    while less is not None:
        less, steps = ENGINE.shrink_placement(less, words), steps + 1
    assert 3 < steps < 12
    assert ENGINE.shrink_placement(GPU, "ValueError: something else") is None


def test_the_length_that_it_says_would_fit_is_believed() -> None:
    words = "ValueError: ... larger than the available KV cache memory; estimated maximum model length is 2048."
    less = ENGINE.shrink_placement(CPU, words)
    assert less is not None and less.shape.sequence_context_tokens == 2048
    assert less.memory == CPU.memory and less.shape.sequences == CPU.shape.sequences


def _page(running: int, prompt: int, cached: int, generated: int, prefill_seconds: float, engines: int = 1) -> str:
    rows = []
    for engine in range(engines):
        label = f'engine="{engine}",model_name="m"'
        rows += [
            f"vllm:num_requests_running{{{label}}} {running}.0",
            f"vllm:num_requests_waiting{{{label}}} 2.0",
            f'vllm:num_requests_waiting_by_reason{{{label},reason="capacity"}} 2.0',
            f"vllm:kv_cache_usage_perc{{{label}}} 0.25",
            f"vllm:prompt_tokens_total{{{label}}} {prompt}.0",
            f"vllm:prompt_tokens_cached_total{{{label}}} {cached}.0",
            f"vllm:generation_tokens_total{{{label}}} {generated}.0",
            f"vllm:iteration_tokens_total_count{{{label}}} {generated + 1}.0",
            f"vllm:request_prefill_time_seconds_sum{{{label}}} {prefill_seconds}",
            f"vllm:request_prompt_tokens_sum{{{label}}} 300.0",
            f"vllm:request_prompt_tokens_count{{{label}}} 3.0",
            f'vllm:cache_config_info{{block_size="16",{label},kv_cache_size_tokens="40000"}} 1.0',
        ]
    return "\n".join(rows) + "\n"


def test_its_metrics_are_the_load_of_an_engine_and_rates_are_learned() -> None:
    metrics = VllmMetrics(8, 1024)
    first = metrics.read(_page(4, 1000, 200, 50, 2.0), 10.0)
    assert (first.running_sequences, first.queued_requests, first.sequences_capacity) == (4, 2, 8)
    assert (first.kv_capacity_tokens, first.kv_used_tokens, first.queued_prompt_tokens) == (40_000, 10_000, 200)
    assert (first.steps, first.prefill_tokens_total, first.decode_tokens_total) == (51, 800, 50)
    assert (first.prefill_tokens_per_second, first.decode_tokens_per_second) == (400.0, {})
    second = metrics.read(_page(4, 2000, 200, 150, 4.0), 11.0)
    assert second.prefill_tokens_per_second == pytest.approx(430.0)
    assert second.decode_tokens_per_second == {4: 100.0}


def test_what_its_warm_up_took_tells_how_fast_it_is() -> None:
    """The request may have ended before anybody saw it run."""
    rows = _page(0, 300, 0, 32, 0.5)
    rows += 'vllm:request_decode_time_seconds_sum{engine="0",model_name="m"} 0.4\n'
    rows += 'vllm:request_generation_tokens_sum{engine="0",model_name="m"} 32.0\n'
    load = VllmMetrics(8, 1024).read(rows, 1.0)
    assert load.prefill_tokens_per_second == 600.0
    assert load.decode_tokens_per_second == pytest.approx({1: 80.0})
    work = ENGINE.build_warm_up(CPU)
    assert work is not None and 1_000 > len(str(work.body["prompt"])) > 300


def test_engines_of_one_server_are_summed() -> None:
    load = VllmMetrics(8, 1024).read(_page(3, 100, 0, 10, 1.0, engines=2), 0.0)
    assert (load.running_sequences, load.kv_capacity_tokens, load.kv_used_tokens) == (6, 80_000, 20_000)


@pytest.mark.parametrize("page", ["", "<html>", "vllm:num_requests_running{} 1.0\n"])
def test_another_page_is_not_taken_for_its_metrics(page: str) -> None:
    with pytest.raises(BackendGarbage):
        VllmMetrics(8, 1024).read(page, 0.0)


def test_options_are_read_as_a_command_line_has_them() -> None:
    given = ["--enforce-eager", "--dtype", "float16", "--block-size=32"]
    assert parse_settings(given) == (("--enforce-eager", ""), ("--dtype", "float16"), ("--block-size", "32"))
