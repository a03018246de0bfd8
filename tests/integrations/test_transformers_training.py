"""Models train on flexlocal, with Transformers' Trainer and compiled, and generate compiled."""

import pytest
import torch
import transformers
from compilers import graphs, needs_compiled_kernels_on_the_cpu
from tiny_models import WORDS, largest, tiny, words

from flexlocal.integrations.transformers import calls, register

LENGTHS = [11, 19, 10]
SUMS = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)


class Packed(torch.utils.data.Dataset):
    """Rows of three documents; each counts up from a word of its own, so that it can be learned."""

    def __len__(self):
        return 12

    def __getitem__(self, row):
        parts = [(row * 5 + 3 * part + torch.arange(n)) % 7 + 3 for part, n in enumerate(LENGTHS)]
        ids = torch.cat(parts)
        return {
            "input_ids": ids,
            "labels": ids.clone(),
            "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]),
        }


def collate(rows):
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    starts = torch.arange(len(rows))[:, None] * sum(LENGTHS) + SUMS[None, :-1]
    end = torch.tensor([len(rows) * sum(LENGTHS)])
    return {**batch, "cu_seq_lens_q": torch.cat([starts.flatten(), end]).to(torch.int32)}


def trained(family, implementation, folder):
    """The model after 20 steps, and the loss of each."""
    model = tiny(family, implementation)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=20,
        per_device_train_batch_size=3,
        learning_rate=3e-3,
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=5,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Packed(), data_collator=collate
    )
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of Trainer and of its dependencies
@pytest.mark.parametrize("family", ["Mistral", "ModernBERT"])
def test_a_trainer_fine_tunes_on_packed_text(family, tmp_path):
    register(full_attention="flexlocal")
    before = calls()
    model, losses = trained(family, "flexlocal", tmp_path)
    assert len(losses) == 20 and losses[-1] < 0.5 * losses[0]
    served = [now - then for now, then in zip(calls(), before, strict=True)]
    assert served == [2 * 20 * 3, 0, 0]  # forward, and once more for what is checkpointed
    if family == "Mistral":  # whose eager code knows the documents of its positions
        _, wanted = trained(family, "eager", tmp_path)
        assert max(abs(one - other) for one, other in zip(losses, wanted, strict=True)) < 1e-3
        ids = Packed()[0]["input_ids"][None, :8]
        model.eval()
        found = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        model.set_attn_implementation("eager")
        assert torch.equal(
            found, model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        )


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("ModernBERT", {"num_hidden_layers": 2}),
        ("gpt-oss", {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}),
    ],
)
@pytest.mark.slow
def test_a_training_step_is_traced_as_one_graph(fresh_compiler, family, changes):
    compare_steps(family, changes, "eager")


@needs_compiled_kernels_on_the_cpu
@pytest.mark.slow
def test_a_training_step_is_compiled_as_one_graph(fresh_compiler):
    compare_steps("Mistral", {"num_hidden_layers": 1}, "inductor")


def compare_steps(family, changes, backend):
    """A compiled forward pass and its gradients are those of the model uncompiled."""
    model, ids = tiny(family, "flexlocal", **changes).train(), words(2, 31)
    arguments = {"input_ids": ids, "labels": ids}
    if family != "ModernBERT":
        arguments["use_cache"] = False
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        out = run(**arguments)
        out.loss.backward()
        grads = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
        found.append((out.logits.detach(), grads))
    (logits, grads), (compiled, grads_compiled) = found
    assert graphs() == 1
    assert largest(logits - compiled) < 1e-5
    for grad, other in zip(grads, grads_compiled, strict=True):
        assert largest(grad - other) < 1e-5


@pytest.mark.slow
def test_a_static_cache_generates_without_a_recompile(fresh_compiler, no_limit_is_hit):
    """256 tokens, from a few keys to four windows full of them."""
    ids, mask = words(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    model = tiny("Mistral", "flexlocal", num_hidden_layers=1, sliding_window=64)
    config = transformers.CompileConfig(fullgraph=True, mode=None, backend="eager")
    config._compile_all_devices = True  # Transformers compiles on accelerators alone

    def generated(tokens, **arguments):
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            **arguments,
        )

    generated(70, compile_config=config)
    # One of a first token, one of any, and one once the window is full, as with sdpa.
    assert graphs() == 3
    found = generated(256, compile_config=config)
    assert graphs() == 3
    model.set_attn_implementation("eager")
    assert torch.equal(found, generated(256, disable_compile=True))


def test_words_of_the_task_are_words_of_the_models():
    ids = Packed()[11]["input_ids"]
    assert ids.min() >= 3 and ids.max() < WORDS
