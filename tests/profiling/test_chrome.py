"""What is read from a trace file: which part a kernel belongs to, its own time, memory of a GPU.

Files of the profiler itself are read in ``test_trace``.
"""

import json

import pytest

from profiling.chrome import Trace, part_of


@pytest.mark.parametrize(
    ("kernel", "around", "part"),
    [
        ("triton_tem_fused_flex_attention_0", None, "attention"),
        ("triton_tem_fused_flex_attention_flex_attention_backward_2", None, "attention backward"),
        ("triton_poi_fused__to_copy_add_arange_cat_cos_mul_sin_sub_1", "attention", "rotary"),
        ("triton_poi_fused__to_copy_add_as_strided_cat_mul_neg_split_3", None, "rotary"),
        ("triton_poi_fused_add_arange_clamp_floor_divide_3", "attention", "block mask"),
        ("triton_poi_fused_add_4", "attention", "attention"),
        ("void at::native::elementwise_kernel<128, 2>", "rotary", "rotary"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32", None, "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32", "attention", "attention"),
        ("using_a_cosy_name", None, "other"),
    ],
)
def test_kernels_are_told_by_their_names(kernel, around, part):
    assert part_of(kernel, around) == part


def gpu_trace(tmp_path):
    """A trace as a GPU gives it: kernels on a stream, launched from two threads of the host."""
    host, stream = {"pid": 1, "tid": 1}, {"pid": 0, "tid": 7}

    def span(category, name, start, duration, where, **facts):
        return {
            "ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, **where,
            "args": facts,
        }  # fmt: skip

    engine = {"pid": 1, "tid": 2}  # the thread that runs backward passes
    memory = {"ph": "i", "name": "[memory]", **host}
    kept = {"Device Type": 1, "Device Id": 0}
    events = [
        span("user_annotation", "forward", 100, 50, host),
        span("user_annotation", "flexlocal::attention", 110, 20, host),
        span("user_annotation", "backward", 160, 50, host),
        span("user_annotation", "flexlocal::rotary", 165, 20, host),
        span("cuda_driver", "cuLaunchKernel", 115, 5, host, correlation=1),
        span("cuda_runtime", "cudaLaunchKernel", 170, 5, engine, correlation=2),
        span("cuda_runtime", "cudaLaunchKernel", 175, 5, engine, correlation=4),
        span("cuda_runtime", "cudaMemcpyAsync", 300, 5, host, correlation=3),
        span("kernel", "elementwise", 150, 30, stream, correlation=1),
        span(
            "kernel", "triton_tem_fused_flex_attention_backward_0", 190, 90, stream, correlation=2
        ),
        span("kernel", "elementwise", 280, 5, stream, correlation=4),
        span("gpu_memcpy", "Memcpy DtoH", 310, 10, stream, correlation=3),
        memory | {"ts": 112, "args": {"Bytes": 512, "Total Allocated": 1512, **kept}},
        memory | {"ts": 180, "args": {"Bytes": -512, "Total Allocated": 1000, **kept}},
        memory | {"ts": 190, "args": {"Bytes": 256, "Total Allocated": 1256, **kept}},
        # In between 256 were freed where the profiler does not look.
        memory | {"ts": 195, "args": {"Bytes": 64, "Total Allocated": 1064, **kept}},
    ]
    file = tmp_path / "gpu.pt.trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    return Trace(file)


def test_kernels_belong_to_what_launched_them(tmp_path):
    rows = [(row.phase, row.part, row.own) for row in gpu_trace(tmp_path).own_times()]
    assert rows == [
        ("backward", "attention backward", 90),
        ("forward", "attention", 30),
        ("", "copy", 10),
        ("backward", "other", 5),  # the label around it at the time is another thread's
    ]


def test_memory_of_a_gpu_counts_from_what_it_held(tmp_path):
    memory = gpu_trace(tmp_path).memory()["cuda:0"]
    assert memory.held == [1000, 1512, 1000, 1256, 1064]
    assert memory.times == [0, 12, 80, 90, 95]
    assert (memory.peak, memory.growth) == (512, 64)
