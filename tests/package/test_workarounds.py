"""All workarounds for torch, with the tests that ask whether they are needed.

A test of the fault makes it again without the workaround, and fails when torch has mended it. A
test of the workaround fails when it is taken away. Where a workaround stands, its docstring or its
comment says which versions of torch need it. A new one is a line here and two tests.
"""

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FILES = {
    "autograd": "tests/eager/test_torch_faults.py",
    "compiler": "tests/flex/test_compiler_faults.py",
    "limits": "tests/flex/test_torch_limits.py",
    "kernels": "tests/gpu/test_kernel_faults.py",
    "memory": "tests/gpu/test_memory_faults.py",
    "backward": "tests/gpu/test_backward_faults.py",
    "dense on a gpu": "tests/gpu/test_dense.py",
    "compiled": "tests/decoding/test_compiled.py",
    "exporters": "tests/eager/test_exporters.py",
    "fused": "tests/eager/test_fused.py",
    "fused alike": "tests/eager/test_fused_alike.py",
    "gpu": "tests/gpu/test_gpu.py",
    "on cpu": "tests/flex/test_flex_on_cpu.py",
    "oracle": "tests/eager/test_eager_against_oracle.py",
    "padded": "tests/layer/test_padded_queries.py",
    "passes": "tests/flex/test_passes.py",
    "safety": "tests/gpu/test_safety.py",
    "shared": "tests/flex/test_shared_qk.py",
    "split": "tests/flex/test_split.py",
    "threads": "tests/flex/test_threads.py",
    "transforms": "tests/eager/test_transforms.py",
}

# File and name where it stands: tests of the fault, tests of the workaround.
WORKAROUNDS = {
    "torch_limits/kernels.py MOST_HEAD": (
        "kernels test_heads_above_256_have_no_tiles_that_fit",
        "gpu test_wide_heads_go_to_the_eager_path",
    ),
    "torch_limits/kernels.py MOST_HEAD_BETWEEN": (
        "kernels test_float32_heads_above_128_have_no_tiles_that_fit",
        "gpu test_heads_lengths_and_windows",
    ),
    "torch_limits/kernels.py LEAST_HEAD": (
        "limits test_narrow_heads_are_refused_by_kernels_of_the_gpu",
        "limits test_narrow_heads_are_refused_by_kernels_of_the_gpu",
    ),
    "torch_limits/kernels.py LEAST_HEAD_ON_CPU": (
        "compiler test_a_kernel_of_the_cpu_reads_keys_past_the_last_of_narrow_heads",
        "on cpu test_nothing_behind_the_last_key_is_read",
    ),
    "torch_limits/tracing.py seen_as_constant": (
        "compiler test_what_is_traced_is_taken_for_an_export",
        "compiler test_what_is_traced_is_taken_for_an_export",
    ),
    "torch_limits/sizes.py plain_int": (
        "limits test_a_kernel_is_made_for_a_number_of_heads",
        "limits test_sizes_become_symbolic_and_plain_again",
    ),
    "torch_limits/sizes.py plain_float": (
        "compiler test_a_kernel_captures_no_symbolic_float",
        "compiler test_settings_of_a_dynamic_layer_are_plain",
    ),
    "torch_limits/sizes.py at_least": (
        "limits test_positions_clipped_by_clamp_are_no_index",
        "limits test_positions_clipped_by_clamp_are_no_index",
    ),
    "torch_limits/tracing.py is_transformed": (
        "autograd test_a_function_of_autograd_has_no_rules_for_transforms",
        "transforms test_vmap_and_gradients_by_sample",
    ),
    "torch_limits/gradients.py added_in_place": (
        "autograd test_vmap_writes_no_batch_into_what_is_none",
        "transforms test_vmap_over_one_tensor",
    ),
    "torch_limits/gradients.py for_each_gradient": (
        "autograd test_an_older_vmap_cannot_add_its_batch_in_place",
        "transforms test_a_batch_of_gradients",
    ),
    "torch_limits/gradients.py refuse_to_be_differentiated": (
        "autograd test_what_is_differentiable_once_leaves_constants_out",
        "passes test_a_second_derivative_is_refused",
    ),
    "torch_limits/memory.py written_out": (
        "compiler test_a_kernel_of_the_cpu_looks_nothing_up_that_is_no_buffer",
        "on cpu test_lengths_with_a_last_token_that_sees_only_itself"
        ", gpu test_a_block_mask_made_inside_a_compiled_function",
    ),
    "torch_limits/memory.py settled": (
        "backward test_tables_of_the_backward_pass_lie_as_inductor_likes",
        "gpu test_dropout_drops_what_the_eager_path_drops",
    ),
    "torch_limits/memory.py copied": (
        "limits test_a_kernel_of_the_cpu_takes_no_neighbours",
        "limits test_a_kernel_of_the_cpu_takes_no_neighbours",
    ),
    "torch_limits/memory.py number_in_memory": (
        "compiler test_a_kernel_of_the_cpu_looks_nothing_up_that_is_no_buffer"
        ", compiler test_dropouts_backward_pass_captures_no_symbolic_length"
        ", backward test_a_mask_captures_no_symbolic_length",
        "on cpu test_lengths_with_a_last_token_that_sees_only_itself"
        ", backward test_a_mask_captures_no_symbolic_length",
    ),
    "torch_limits/tracing.py refuse_old_onnx": (
        "autograd test_the_older_onnx_exporter_cannot_unfold",
        "exporters test_what_cannot_be_served_says_what_can",
    ),
    "torch_limits/compiling.py sizes_told_apart": (
        "compiler test_a_kernel_of_the_cpu_takes_one_size_for_another",
        "compiler test_a_kernel_of_the_cpu_takes_one_size_for_another",
    ),
    "torch_limits/compiling.py inductor": (
        "compiler test_a_graph_is_not_retained"
        ", compiler test_the_backward_pass_is_compiled_at_its_first_call"
        ", limits test_the_gradient_of_a_sum_of_views_is_copied_by_torchs_own_compiler",
        "on cpu test_a_graph_that_is_retained"
        ", compiler test_the_backward_pass_is_compiled_at_its_first_call"
        ", limits test_the_gradient_of_a_sum_of_views_is_copied_by_torchs_own_compiler",
    ),
    "spec.py may_hide_first": (
        "autograd test_later_keys_are_hidden_before_scores_are_scaled",
        "fused test_what_hides_nothing_is_right_with_any_scale",
    ),
    "eager/tiles.py Sizes.tiles": (
        "autograd test_an_export_guards_on_tiles_that_are_just_enough",
        "exporters test_an_export_over_a_named_range_serves_all_of_it",
    ),
    "eager/tiles.py Tiles._overlapping": (
        "autograd test_the_gradient_of_an_unfold_is_added_up_in_wrong_places",
        "autograd test_compilers_are_given_no_gradient_of_an_unfold",
    ),
    "flex/attend.py _as_kernels_read": (
        "kernels test_a_decoding_kernel_takes_a_computed_query_for_contiguous",
        "gpu test_a_decoding_kernel_by_name",
    ),
    "flex/kernel.py Blocks.mask": (
        "kernels test_sparse_blocks_of_64_leave_no_tiles_for_the_backward_pass",
        "gpu test_arguments",
    ),
    "flex/renormalised.py _Together": (
        "kernels test_a_log_sum_exp_alone_has_no_backward_pass",
        "kernels test_a_log_sum_exp_alone_has_no_backward_pass",
    ),
    "flex/renormalised.py _Renormalised.backward": (
        "backward test_a_table_of_equal_numbers_has_gaps",
        "gpu test_dropout_drops_what_the_eager_path_drops",
    ),
    "flex/renormalised.py _Scores._of_dropped": (
        "backward test_a_bias_gathers_gradients_of_hidden_keys",
        "gpu test_dropout_drops_what_the_eager_path_drops",
    ),
    "flex/split.py": (
        "kernels test_a_launch_counts_to_65535, memory test_kernels_read_elsewhere",
        "split test_many_batch_entries, split test_many_heads"
        ", split test_more_elements_than_32_bits_count",
    ),
    "flex/threads.py": (
        "compiler test_a_thread_that_runs_meets_another_that_traces",
        "threads test_what_compiles_is_alone_and_what_is_compiled_is_not",
    ),
    "masks/documents.py documents_from_cu_seqlens": (
        "kernels test_a_search_reads_a_view_without_its_offset",
        "kernels test_a_search_reads_a_view_without_its_offset",
    ),
    "mods/shared_qk.py unit_keys": (
        "autograd test_normalize_has_no_second_derivative_at_0",
        "oracle test_gradients_of_gradients",
    ),
}

# Seen in whole calls once, and not made again by a kernel alone (H200, torch 2.11): no test tells
# when torch has mended them.
SEEN_ONCE = {
    "mods/shared_qk.py SELF_SCORE_OF_KERNELS": (
        "shared test_a_key_that_is_seen_alone_weighs_one_in_a_kernel",
    ),
    "mods/shared_qk.py _beside_itself": (
        "gpu test_arguments, gpu test_dropout_drops_what_the_eager_path_drops",
    ),
}

# Needed by the way in which torch, or its kernels, are made: no version is going to mend them.
BY_DESIGN = {
    "torch_limits/tensors.py stop_unless": (
        "compiler test_no_branch_on_a_tensor_is_traced",
        "compiled test_tokens_are_taken_back_inside_a_graph",
    ),
    "torch_limits/tracing.py is_tracing": (
        "autograd test_sizes_are_tensors_while_torch_jit_traces",
        "exporters test_a_trace_serves_every_length_and_batch",
    ),
    "torch_limits/compiling.py mark_length_dynamic": (
        "compiler test_sizes_that_stay_at_first_make_a_graph_more",
        "compiler test_sizes_that_stay_at_first_make_a_graph_more",
    ),
    "torch_limits/attention.py flash_on_cpu": (
        "autograd test_attention_returns_no_log_sum_exps",
        "fused alike test_gradients_by_the_kernel",
    ),
    "torch_limits/attention.py flash_backward_on_cpu": (
        "autograd test_attention_returns_no_log_sum_exps",
        "fused alike test_gradients_by_the_kernel",
    ),
    "torch_limits/attention.py efficient_on_gpu": (
        "kernels test_attention_with_a_mask_makes_a_plan_for_each_size",
        "dense on a gpu test_no_size_has_a_plan",
    ),
    "torch_limits/attention.py flash_on_gpu": (
        "kernels test_attention_with_a_mask_makes_a_plan_for_each_size",
        "dense on a gpu test_no_size_has_a_plan",
    ),
    "flex/own_graph.py in_own_graph": (
        "compiler test_callables_of_the_same_code_share_a_limit",
        "on cpu test_features_against_the_oracle",
    ),
    "flex/own_graph.py without_gradients_on_cpu": (
        "compiler test_a_kernel_of_the_cpu_takes_nothing_that_requires_a_gradient",
        "on cpu test_features_against_the_oracle",
    ),
    "masks/keys.py finite_padding": (
        "kernels test_a_hidden_nan_spreads",
        "padded test_no_gradient_of_a_real_token",
    ),
    "masks/keys.py without_padding": (
        "kernels test_a_hidden_nan_spreads",
        "safety test_what_a_mask_hides_never_gets_out",
    ),
    "masks/block_lists.py block_mask": (
        "limits test_a_kernel_of_the_cpu_wants_lists_as_wide_as_the_grid",
        "on cpu test_lengths_share_kernels_and_give_the_right_result",
    ),
}

NO_WORKAROUNDS = {
    "KERNEL_DTYPES": "what kernels take, and why they are not there",
    "unavailable": "what kernels take, and why they are not there",
    "cpp_compiler": "what kernels take, and why they are not there",
    "has_float64": "what a device holds",
    "has_address": "asks torch",
    "raw_stream": "asks torch",
    "is_symbolic": "asks torch",
    "is_exporting": "asks torch",
    "has_values": "asks torch",
    "state_of": "asks torch",
    "multiplies_float16": "asks torch",
    "at_most": "as at_least",
    "fast_tanh": "an instruction that torch does not use, for speed",
    "fast_capped": "an instruction that torch does not use, for speed",
    "lower_fast_tanh": "an instruction that torch does not use, for speed",
    "keep_guard": "for speed",
    "Passes": "for speed",
    "passes_of": "for speed",
}

EVERY = {**WORKAROUNDS, **SEEN_ONCE, **BY_DESIGN}


@lru_cache
def parsed(path):
    text = (ROOT / path).read_text()
    return text, ast.parse(text)


def source(place):
    """What stands at ``place``, with a docstring after it; of a file alone, its docstring."""
    file, _, dotted = place.partition(" ")
    text, tree = parsed(f"flexlocal/{file}")
    if not dotted:
        return ast.get_docstring(tree)
    body = tree.body
    for name in dotted.split("."):
        (index,) = [i for i, node in enumerate(body) if name in names_of(node)]
        found, after = body[index], body[index + 1 : index + 2]
        body = getattr(found, "body", [])
    more = [x for x in after if isinstance(x, ast.Expr)]
    return "\n".join(ast.get_source_segment(text, node) for node in [found, *more])


def names_of(node):
    if isinstance(node, ast.Assign):
        targets = [x.elts if isinstance(x, ast.Tuple) else [x] for x in node.targets]
        return {name.id for each in targets for name in each if isinstance(name, ast.Name)}
    return {getattr(node, "name", None)}


@pytest.mark.parametrize("place", EVERY)
def test_each_has_a_test_of_the_fault_and_one_of_itself(place):
    source(place)
    for tests in EVERY[place]:
        for test in tests.split(", "):
            *file, name = test.split()
            text, _ = parsed(FILES[" ".join(file)])
            assert f"def {name}(" in text, test


@pytest.mark.parametrize("place", [*WORKAROUNDS, *SEEN_ONCE])
def test_each_says_which_versions_need_it(place):
    assert re.search(r"[Tt]orch\s+2\.\d+|CUDA \d+\.\d", source(place)), "no version is named"


def test_every_name_of_torch_limits_is_listed():
    public = set()
    for file in (ROOT / "flexlocal/torch_limits").glob("*.py"):
        _, tree = parsed(file.relative_to(ROOT))
        public |= {name for node in tree.body for name in names_of(node) if name}
    public = {name for name in public if not name.startswith("_")} - {"Index", "Function", "Pass"}
    listed = {place.split()[1] for place in EVERY if place.startswith("torch_limits/")}
    assert public == listed | set(NO_WORKAROUNDS)
    assert not listed & set(NO_WORKAROUNDS)
