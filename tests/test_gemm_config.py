"""The choice of a compiled kernel, a pure function of the shape, for all shapes with a name."""

from itertools import product

import pytest

from jax_mxfp4 import ffi

SHAPES = {
    "qkv": (5120, 2880),
    "o_proj": (2880, 4096),
    "gate_up": (5760, 2880),
    "down": (2880, 2880),
    "lm_head": (201088, 2880),
    "llama70b_up": (28672, 8192),
    "llama70b_down": (8192, 28672),
}
MS = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 1024, 4096]
H100 = 132
SHARED = 0  # all thread blocks share all tiles


@pytest.fixture(scope="module")
def select():
    native = pytest.importorskip("jax_mxfp4._native", reason="the native module is not built")
    return native.select_gemm


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_stream_with_few_tokens(select, name):
    # Beyond, K is split between thread blocks; but lm_head has tiles enough, and up's activations
    # would be read again for every two tiles, as K does not fit one stage.
    most = {"lm_head": 16, "llama70b_down": 4}.get(name, 8)
    for m in MS:
        config = select(m, *SHAPES[name], H100, H100)
        assert config["kind"] == ("streaming" if m <= most else "wgmma")
        assert config["tile_m"] >= min(m, 8)
        if most < m <= 16:
            assert config["split"] == SHARED if name == "llama70b_up" else config["split"] > 1


def test_few_rows_stream_unless_splitting_k_pays(select):
    def kind(m, n, k):
        return select(m, n, k, H100, H100)["kind"]

    # K in one stage: 8 tokens always, 16 where K is short.
    assert kind(8, 8192, 3072) == "streaming" and kind(16, 8192, 3072) == "wgmma"
    assert kind(16, 2048, 1024) == "streaming"
    # In several: a tile of 32 rows for each multiprocessor, or so many rows that nothing is split.
    assert kind(8, 4096, 14336) == "streaming" and kind(8, 8192, 8192) == "wgmma"
    assert kind(8, 16384, 53248) == "streaming"


def test_kernels_need_their_hardware(select):
    for m, shape in product(MS, SHAPES.values()):
        assert select(m, *shape, 0, 0)["kind"] == "tiled"
        assert select(m, *shape, H100, 0)["kind"] == ("streaming" if m <= 16 else "tiled")
        assert select(m, *shape, 0, H100)["kind"] == ("wgmma" if m > 8 else "tiled")


def test_wgmma_reads_64_of_k_at_a_time(select):
    for m, k in product((17, 64, 300), (32, 96, 160)):
        assert select(m, 256, k, H100, H100)["kind"] == "tiled"
        assert select(m, 256, k + 32, H100, H100)["kind"] == "wgmma"


def test_wgmma_needs_rows_in_eights(select):
    for m in (17, 64, 300):
        assert select(m, 252, 256, H100, H100)["kind"] == "tiled"
        assert select(m, 248, 256, H100, H100)["kind"] == "wgmma"


def test_clusters_that_split_k_run_at_once(select):
    for m, n, k in product((17, 33, 100, 128, 300, 1000), range(8, 9000, 184), (64, 320, 2880)):
        config = select(m, n, k, H100, H100)
        if config["split"] in (1, SHARED):
            continue
        assert config["kind"] == "wgmma"
        tiles = -(-m // config["tile_m"]) * -(-n // config["tile_n"])
        assert tiles * config["split"] <= H100
        assert config["split"] <= -(-k // 128)  # every thread block has some of K


def test_tiles_are_shared_where_the_last_wave_is_far_from_full(select):
    up = SHAPES["llama70b_up"]
    # 224 tiles of 128 slabs each on 132: whole waves would be 85 % full.
    assert all(select(m, *up, H100, H100)["split"] == SHARED for m in (16, 128))
    for m, n, k in product((17, 64, 128, 200, 512, 3000), range(64, 40000, 1600), (64, 2880, 8192)):
        config = select(m, n, k, H100, H100)
        tiles = -(-m // config["tile_m"]) * -(-n // config["tile_n"])
        if config["split"] == SHARED:
            assert config["kind"] == "wgmma" and config["tile_m"] == 128
            # Else parts come late, or operands no longer meet in L2.
            assert H100 < tiles < 2 * H100
    assert select(128, 128 * H100, 8192, H100, H100)["split"] == 1
    # More multiprocessors than there is room for parts.
    assert select(128, *up, H100, 200)["split"] != SHARED


def test_tiles_follow_the_tokens(select):
    """No tile is four times as wide as the tokens need; a code is decoded for 96 of them."""
    for m, shape in product((17, 33, 65, 129, 257), SHAPES.values()):
        assert select(m, *shape, H100, H100)["tile_m"] < 4 * max(m, 32)
    for m, shape in product((17, 40, 64, 65, 96, 97, 500, 4096), SHAPES.values()):
        assert select(m, *shape, H100, H100)["tile_m"] >= min(m, 96)
    for shape in SHAPES.values():
        assert select(4096, *shape, H100, H100)["tile_m"] >= 160


@pytest.mark.parametrize(
    ("m", "name", "tile_m"), [(256, "qkv", 96), (512, "down", 104), (512, "qkv", 176)]
)
def test_widths_fill_one_wave(select, m, name, tile_m):
    n, k = SHAPES[name]
    config = select(m, n, k, H100, H100)
    assert (config["tile_m"], config["tile_n"], config["split"]) == (tile_m, 128, 1)
    assert 0.8 * H100 < -(-m // tile_m) * -(-n // 128) <= H100


def test_streaming_covers_all_tokens_and_whole_tiles(select):
    for m, n, k in product((1, 8, 9, 16), range(8, 400, 8), (32, 64, 96, 2880, 3200, 4096, 8192)):
        config = select(m, n, k, H100, 0)
        if config["kind"] == "streaming":
            assert config["tile_m"] >= m
            assert n % config["tile_n"] == 0
            # Bulk copies move multiples of 16 bytes: the scales of a row, where they are split.
            assert k <= config["stage_k"] or k // 32 % 16 == 0
        else:
            assert n % 16 or (k > 3072 and k // 32 % 16)


@pytest.mark.parametrize(
    ("n", "tile_n"),
    [
        (5120, 16),  # 320 tiles of 16 on 132: at most 48 rows each; of 32: 64
        (2880, 32),  # 32 rows each either way, and wider tiles read the activations less often
        (201088, 16),  # many tiles: sixteen warps, which stay busy from one to the next
    ],
)
def test_tiles_balance_the_multiprocessors(select, n, tile_n):
    assert select(1, n, 2880, H100, H100)["tile_n"] == tile_n


def test_ragged_rows_are_tiled(select):
    assert select(1, 8191, 4096, H100, H100)["kind"] == "tiled"
    assert select(1, 100, 64, H100, H100)["kind"] == "tiled"


def test_the_index_names_one_configuration(select):
    found = {}
    for m, shape, multiprocessors in product(MS, SHAPES.values(), (0, H100)):
        config = select(m, *shape, multiprocessors, multiprocessors)
        config.pop("split")
        assert found.setdefault(config["index"], config) == config
    assert len(found) > 8


def test_the_module_reports_its_build():
    assert ffi.build_info()["cuda_kernels"] is ffi.has_cuda_kernels()


# The expert layer ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def select_moe():
    native = pytest.importorskip("jax_mxfp4._native", reason="the native module is not built")
    return native.select_moe


TOP_K, WIDTH = 4, 2880


@pytest.mark.parametrize("experts", [32, 128])
def test_experts_stream_until_they_have_many_tokens(select_moe, experts):
    for tokens in (2, 4, 8, 16, 32, 64):
        config = select_moe(tokens, TOP_K, experts, WIDTH, WIDTH, H100, H100)
        assert config["kind"] == "streaming"
        assert config["stage_k"] >= WIDTH  # K in one stage
        many = 4 if experts == 32 else 5
        assert config["tile_m"] == (16 if TOP_K * tokens >= many * experts else 8)
    for tokens in (16 * experts // TOP_K, 1024, 4096):
        config = select_moe(tokens, TOP_K, experts, WIDTH, WIDTH, H100, H100)
        assert config["kind"] == "wgmma"
        assert config["split"] == 1


def test_expert_kernels_need_their_hardware_and_widths(select_moe):
    for tokens in (1, 64, 1024):
        assert select_moe(tokens, TOP_K, 32, WIDTH, WIDTH, 0, 0)["kind"] == "tiled"
        # K of more than one stage is not streamed; wgmma reads 64 of K at a time.
        assert select_moe(tokens, TOP_K, 32, 8192, WIDTH, H100, 0)["kind"] == "tiled"
        assert select_moe(tokens, TOP_K, 32, WIDTH, 8192, H100, 0)["kind"] == "tiled"
        assert select_moe(tokens, TOP_K, 4, 96, 8192, H100, H100)["kind"] == "tiled"
        assert select_moe(tokens, TOP_K, 4, 8192, 96, H100, H100)["kind"] == "tiled"
    assert select_moe(1024, TOP_K, 4, 8192, 8192, H100, H100)["kind"] == "wgmma"
    # The schedule of a streaming kernel has limits.
    assert select_moe(256, TOP_K, 512, 64, 64, H100, 0)["kind"] == "streaming"
    assert select_moe(257, TOP_K, 512, 64, 64, H100, 0)["kind"] == "tiled"
    assert select_moe(2, TOP_K, 513, 64, 64, H100, 0)["kind"] == "tiled"


def test_one_token_has_its_own_kernel(select_moe):
    assert select_moe(1, TOP_K, 128, WIDTH, WIDTH, H100, H100)["kind"] == "one_token"
    assert select_moe(1, 1, 1000, 32, 64, H100, 0)["kind"] == "one_token"
    for shape in (
        (2, 4, 32, 64, 64),
        (1, 5, 32, 64, 64),
        (1, 4, 32, 3104, 64),
        (1, 4, 32, 64, 3136),
        (1, 4, 32, 64, 96),
    ):
        assert select_moe(*shape, H100, H100)["kind"] != "one_token"
    assert select_moe(1, TOP_K, 32, WIDTH, WIDTH, 0, 0)["kind"] == "tiled"


def test_a_tile_of_an_expert_is_seldom_much_larger_than_its_tokens(select_moe):
    for experts, tokens in product((8, 32, 128), (512, 1024, 2048, 4096, 8192)):
        mean = TOP_K * tokens / experts
        config = select_moe(tokens, TOP_K, experts, WIDTH, WIDTH, H100, H100)
        assert config["tile_m"] <= max(32, 2 * mean)
