"""The mutants, in the order of the failure table."""

from __future__ import annotations

from tests.mutants.run import Mutant

MUTANTS = (
    Mutant(
        8,
        "pass 2 repeats pass 1's random draws",
        "randomness.py",
        "        torch.set_rng_state(self.cpu)\n",
        "",
        "tests/test_exactness_flavours.py::test_dropout_is_the_same_in_both_passes",
    ),
    Mutant(
        9,
        "pass 2 runs on copies of buffers",
        "buffers.py",
        "module._buffers[name] = None if buffer is None else buffer.clone()",
        "pass",
        "tests/test_zoo.py::test_batch_norm_counts_one_step",
    ),
    Mutant(
        10,
        "hooks are silent again after an exception",
        "hooks.py",
        "            self.running = before\n",
        "            self.running = this\n",
        "tests/test_exceptions.py::test_an_exception_anywhere",
    ),
    Mutant(
        11,
        "eval mode and no_grad return the plain loss",
        "regularizer.py",
        "not torch.is_grad_enabled() or torch.is_inference_mode_enabled()",
        "False",
        "tests/test_no_trace.py::test_eval_and_no_grad_return_the_plain_loss",
    ),
    Mutant(
        12,
        "a KV cache in the batch is refused",
        "checks.py",
        "if value is not None and (key in",
        "if False and (key in",
        "tests/test_bad_steps.py::test_a_batch_with_a_cache",
    ),
    Mutant(
        21,
        "copies of a model carry inert hooks",
        "hooks.py",
        "        return Hook(None, self.name)\n\n    def __reduce__",
        "        return self\n\n    def __reduce__",
        "tests/test_no_trace.py::test_copies_of_an_attached_model",
    ),
    Mutant(
        26,
        "clean states that the model writes over are found",
        "replays.py",
        "if state.hidden._version != state.version}",
        "if False}",
        "tests/test_outputs.py::test_outputs_changed_in_place_afterwards",
    ),
    Mutant(
        28,
        "padding does not count",
        "tokens.py",
        "index = mask.flatten().nonzero().squeeze(1)",
        "index = torch.ones_like(mask).flatten().nonzero().squeeze(1)",
        "tests/test_tokens.py::test_extra_padding_changes_nothing",
    ),
    Mutant(
        30,
        "DataParallel is refused",
        "checks.py",
        "        if isinstance(module, nn.DataParallel):\n            raise ValueError(NO_REPLICAS)\n",
        "",
        "tests/test_bad_steps.py::test_data_parallel",
    ),
    Mutant(
        33,
        "hooks on parameters act once, on the final gradient",
        "graph.py",
        "            hooks.clear()  # the engine holds this very dictionary\n",
        "            pass\n",
        "tests/test_exactness_leaves.py::test_hooks_on_parameters_act_once",
    ),
)
