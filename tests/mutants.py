"""Breaks the code on purpose and shows that a named test notices.

  python tests/mutants.py            all of them
  python tests/mutants.py radius     those with the word in their name

Each mutant is one replacement, applied to a copy of the repository; its tests
must fail there, and must pass on the copy before any. Run by hand, not in CI.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
  """One break: `old`, found exactly once in `file`, becomes `new`."""
  name: str
  file: str
  old: str
  new: str
  test: str


MUTANTS = [
    # Model.
    Mutant('radius off by one', 'longt5_flax/model/attention.py',
           'np.abs(offsets) < block', 'np.abs(offsets) < block - 1',
           'tests/model/test_attention.py::test_mask_written_out'),
    Mutant('orphan dropped', 'longt5_flax/model/global_tokens.py',
           'jnp.where(positions >= block_size, own - 1, -1)', '-1',
           'tests/model/test_golden_flaxformer.py::test_global_blocks'),
    Mutant('orphan left out of the sum', 'longt5_flax/model/global_tokens.py',
           'min(2 * block_size - 1, x', 'min(block_size, x',
           'tests/model/test_golden_flaxformer.py::test_encoder_output'),
    Mutant('gradient of the side bias from one row',
           'longt5_flax/model/side_bias.py',
           'taken, 0), axis=(0, 1, 2))', 'taken, 0)[:1], axis=(0, 1, 2))',
           'tests/model/test_golden_flaxformer.py::test_gradients'),
    Mutant('far end of the side bias without its gradient',
           'longt5_flax/model/side_bias.py',
           'offsets >= reach', 'offsets > reach',
           'tests/model/test_side_bias.py::test_equals_a_look_up'),
    Mutant('fused: the far biases change places',
           'longt5_flax/model/fused_attention.py',
           'bias[:, ::2 * reach] * LOG2_E', 'bias[:, ::-2 * reach] * LOG2_E',
           'tests/model/test_implementations.py::test_fused_equals_reference'),
    Mutant('fused: near window too narrow',
           'longt5_flax/model/fused_attention.py',
           'near = 2 * reach - 2 + blocks', 'near = 2 * reach - 2 - blocks',
           'tests/model/test_implementations.py::test_fused_equals_reference'),
    Mutant('fused: no gradient of the far bias',
           'longt5_flax/model/fused_attention.py',
           '.at[:, -1].add(d_far[:, 1])', '',
           'tests/model/test_implementations.py::test_fused_equals_reference'),
    Mutant('fused: a part of the queries is left out',
           'longt5_flax/model/kernels/fused_attention_triton.py',
           'size = (end - start + parts - 1) // parts',
           'size = (end - start) // parts',
           'tests/model/test_implementations.py::test_fused_equals_reference'),
    Mutant('fused: tiles of two segments need no mask',
           'longt5_flax/model/kernels/calls.py',
           'jnp.where(least == most, most, -1)', 'most',
           'tests/model/test_implementations.py::test_fused_equals_reference'
           '[mixed-7-4-6]'),
    Mutant('fused: padding among keys needs no mask',
           'longt5_flax/model/kernels/calls.py',
           '== jnp.max(key_segments, axis=2)',
           '<= jnp.max(key_segments, axis=2)',
           'tests/model/test_implementations.py'
           '::test_segment_attention_equals_reference'),
    Mutant('segment attention: a part counts as much as any other',
           'longt5_flax/model/kernels/segment_attention_triton.py',
           'jnp.exp2(lse - top)', 'jnp.exp2(0 * lse)',
           'tests/model/test_implementations.py'
           '::test_segment_attention_equals_reference'),
    Mutant('segment attention: the last of few queries is left out',
           'longt5_flax/model/kernels/triton_tiles.py',
           'jnp.minimum(jnp.arange(product_size(size)), size - 1)',
           'jnp.minimum(jnp.arange(product_size(size)), max(size - 2, 0))',
           'tests/model/test_implementations.py::test_stored_equals_reference'),
    Mutant('fused: operands are not narrow',
           'longt5_flax/model/kernels/calls.py',
           'operand = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32',
           'operand = jnp.float32',
           'tests/model/test_implementations.py'
           '::test_fused_rounds_as_bfloat16_does'),
    Mutant('fused: biases of other heads on a mesh',
           'longt5_flax/model/kernels/calls.py',
           "    rows = _mesh_axes(mesh, 'batch'",
           '    tables = tuple(jnp.roll(x, 1, 0) for x in tables)\n'
           '    arguments = tokens, tables, ids\n'
           "    rows = _mesh_axes(mesh, 'batch'",
           'tests/model/test_implementations.py::test_fused_on_a_mesh'),
    Mutant('stored keys: no multiple of a tile',
           'longt5_flax/model/kernels/calls.py',
           'added[axis] = -x.shape[axis] % multiple',
           'added[1] = -x.shape[1] % multiple',
           'tests/model/test_implementations.py::test_stored_equals_reference'),
    Mutant('stored keys: on a mesh those of other heads',
           'longt5_flax/model/kernels/calls.py',
           'PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)',
           'PartitionSpec(rows, None, heads), PartitionSpec(rows)',
           'tests/model/test_implementations.py::test_stored_on_a_mesh'),
    Mutant('stored keys: not in the kernel', 'longt5_flax/model/decoder.py',
           'not self._crosses_in_a_kernel(key.shape[2])', 'True',
           'tests/model/test_implementations.py::test_in_decoding'),
    Mutant('seen places: the new target is one',
           'longt5_flax/model/kernels/cached_attention_triton.py',
           '(held_by == rows) & (positions < start)',
           '(held_by == rows) & (positions <= start)',
           'tests/model/test_cached_attention.py'
           '::test_seen_places_written_out'),
    Mutant('seen places: what none sees is one',
           'longt5_flax/model/kernels/cached_attention_triton.py',
           'is_seen = bits != 0', 'is_seen = positions < start + bits * 0',
           'tests/model/test_cached_attention.py'
           '::test_reads_only_what_is_seen'),
    Mutant('seen places: the last tile is not filled up',
           'longt5_flax/model/kernels/cached_attention_triton.py',
           'filling = count + ', 'filling = count + size + ',
           'tests/model/test_cached_attention.py'
           '::test_equals_attention_to_all'),
    Mutant('seen places: a row sees what others do',
           'longt5_flax/model/kernels/cached_attention_triton.py',
           '(bits[None, :] >> own[:, None]) & 1 == 1',
           '(bits[None, :] >> own[:, None] * 0) > 0',
           'tests/model/test_cached_attention.py'
           '::test_equals_attention_to_all'),
    Mutant('seen places: those of the turn before',
           'longt5_flax/model/kernels/cached_attention_triton.py',
           'return places_of(jnp.minimum(i + 1, turns - 1)), softmax',
           'return places, softmax',
           'tests/model/test_cached_attention.py'
           '::test_equals_attention_to_all'),
    Mutant('fused on TPUs: beyond the end of a row is padding',
           'longt5_flax/model/kernels/fused_attention_tpu.py',
           'jnp.where(tile > 0, before, _NOWHERE)', 'before',
           'tests/model/test_implementations.py'
           '::test_fused_on_a_tpu_equals_reference'),
    Mutant('fused on TPUs: the far biases change places',
           'longt5_flax/model/kernels/fused_attention_tpu.py',
           'behind = offset > 0', 'behind = offset < 0',
           'tests/model/test_implementations.py'
           '::test_fused_on_a_tpu_equals_reference'),
    Mutant('fused on TPUs: the last tile of queries is left out',
           'longt5_flax/model/kernels/fused_attention_tpu.py',
           'tile = first + step\n\n  @pl.when(step == 0)',
           'tile = first + step + 1\n\n  @pl.when(step == 0)',
           'tests/model/test_implementations.py'
           '::test_fused_on_a_tpu_equals_reference'),
    Mutant('fused on TPUs: JAX chooses the precision',
           'longt5_flax/model/kernels/fused_attention_tpu.py',
           'else jax.lax.Precision.DEFAULT', 'else None',
           'tests/training/test_compile_for_tpu.py'),
    Mutant('auto takes what is not there',
           'longt5_flax/model/attention_choice.py',
           "if platform != 'cpu':", 'if False:',
           'tests/model/test_attention_choice.py::test_choice'),
    Mutant('chunk sees the wrong neighbour',
           'longt5_flax/model/chunked_attention.py', 'x[:-1, :, -1:]',
           'x[:-1, :, :1]',
           'tests/model/test_implementations.py::test_chunked_equals_reference'),
    Mutant('side offset sign', 'longt5_flax/model/side_bias.py',
           'offsets = jnp.arange(num_globals) - blocks[..., None]\n  index',
           'offsets = blocks[..., None] - jnp.arange(num_globals)\n  index',
           'tests/model/test_golden_flaxformer.py::test_encoder_output'),
    Mutant('bias not shared by the layers', 'longt5_flax/model/layers.py',
           '      carry = call(layer, carry, context)\n',
           '      carry = call(layer, carry, context if layer is layers[0] '
           'else context._replace(bias=context.bias * 0))\n',
           'tests/model/test_golden_flaxformer.py::test_encoder_output'),
    Mutant('globals of other segments seen', 'longt5_flax/model/attention.py',
           'side_mask = _same_segment('
           'segments_BNC, side.segment_ids[:, None])',
           'side_mask = (segments_BNC[..., None] > 0) & '
           '(side.segment_ids[:, None, None] > 0)',
           'tests/model/test_reach.py::test_reach_in_a_packed_row'),
    Mutant('decoder sees one ahead', 'longt5_flax/model/decoder.py',
           '== segment_ids[:, None, None])\n    if decoder_mask',
           '== segment_ids[:, None, None], 1)\n    if decoder_mask',
           'tests/model/test_reach.py'
           '::test_decoder_is_causal_and_sees_the_inputs'),
    Mutant('head not scaled', 'longt5_flax/model/decoder.py',
           'if self.config.scale_decoder_outputs:', 'if False:',
           'tests/model/test_options.py::test_scaling_is_apart_from_tying'),
    Mutant('cache does not move', 'longt5_flax/model/decoder.py',
           'start + num_targets)', 'start + 0)',
           'tests/model/test_options.py::test_steps_equal_the_whole_target'),
    Mutant('float16 not scaled', 'longt5_flax/model/precision.py',
           'exponent = exponent - _FLOAT16_TOP', 'exponent = exponent * 0',
           'tests/model/test_precision.py::test_close_to_float32'),
    # Objective.
    Mutant('tie broken to the earlier sentence',
           'longt5_flax/data/gap_sentences.py',
           "order = np.argsort(scores, kind='stable')",
           "order = np.argsort(scores[::-1], kind='stable')[::-1]",
           'tests/data/test_gap_sentences.py'
           '::test_all_scores_zero_selects_the_last'),
    Mutant('end of sequence after the cut',
           'longt5_flax/data/gap_sentences.py',
           '_cut(itertools.chain([task], inputs, [eos]), lengths[0])',
           'np.append(_cut(itertools.chain([task], inputs), lengths[0] - 1), '
           'eos)',
           'tests/data/test_gap_sentences.py::test_eos_goes_before_the_cut'),
    Mutant('mask ratio not drawn', 'longt5_flax/data/gap_sentences.py',
           'float(np.float32(ratio)) * rng.uniform(low, 1.0)',
           'float(np.float32(ratio)) * max(low, 1.0)',
           'tests/data/test_gap_sentences.py'
           '::test_dynamic_ratio_is_drawn_for_dynamic_rouge_only'),
    # Data.
    Mutant('decoder inputs cross segments', 'longt5_flax/data/row_streams.py',
           'targets[:-1] * (segments[1:] == segments[:-1])', 'targets[:-1]',
           'tests/data/test_row_streams.py::test_row'),
    Mutant('stream state not restored', 'longt5_flax/data/row_streams.py',
           "    self._rows.set_state(state['rows'])\n", '',
           'tests/data/test_pipeline.py::test_resumes_after_any_batch'),
    Mutant('span before its text', 'longt5_flax/data/span_corruption.py',
           '[text_lengths, noise_lengths]', '[noise_lengths, text_lengths]',
           'tests/data/test_span_corruption.py::test_noise_counts'),
    Mutant('span lengths not drawn alike',
           'longt5_flax/data/span_corruption.py',
           'rng.permutation(total - 1)', 'np.arange(total - 1)',
           'tests/data/test_span_corruption.py'
           '::test_spans_of_every_shape_are_as_likely'),
    Mutant('span without its own sentinel',
           'longt5_flax/data/span_corruption.py',
           'marked[first] = sentinel_ids[:np.count_nonzero(first)]',
           'marked[first] = sentinel_ids[0]',
           'tests/data/test_span_corruption.py'
           '::test_both_sides_together_are_the_text'),
    Mutant('supervised: end of sequence is cut',
           'longt5_flax/data/objectives.py',
           'room = self._lengths[0] - 1',
           'room = self._lengths[0]',
           'tests/data/test_supervised.py::test_long_inputs_are_cut_where_the_policy_says'),
    Mutant('supervised: prefix forgotten',
           'longt5_flax/data/objectives.py',
           'self._options.prefix + text',
           'text',
           'tests/data/test_supervised.py::test_prefix'),
    Mutant('supervised: middle kept, end cut',
           'longt5_flax/data/objectives.py',
           'ids[len(ids) - last:]',
           'ids[room - last:room]',
           'tests/data/test_supervised.py::test_long_inputs_are_cut_where_the_policy_says'),
    Mutant('supervised: example at the limit left out',
           'longt5_flax/data/objectives.py',
           'lost = max(0, len(ids) - room)',
           'lost = max(0, len(ids) + 1 - room)',
           'tests/data/test_supervised.py::test_long_inputs_are_cut_where_the_policy_says'),
    Mutant('supervised: targets without an end',
           'longt5_flax/data/objectives.py',
           'self._ended(ids[:self._lengths[1] - 1])',
           'np.array(ids[:self._lengths[1]], np.int32)',
           'tests/data/test_supervised.py::test_inputs_and_targets_end'),
    Mutant('supervised: left out, not counted',
           'longt5_flax/data/row_streams.py',
           'left_out += 1',
           'pass',
           'tests/data/test_supervised.py::test_what_is_cut_is_counted'),
    Mutant('supervised: cut inputs counted as targets',
           'longt5_flax/data/row_streams.py',
           '(int((lost > 0).sum()), int((lost_inputs > 0).sum()))',
           '(int((lost_inputs > 0).sum()), int((lost > 0).sum()))',
           'tests/data/test_supervised.py::test_what_is_cut_is_counted'),
    Mutant('supervised: starts from ids of another vocabulary',
           'train.py', "abstract.params, values['vocabulary'])",
           'abstract.params)',
           'tests/test_train_supervised.py'
           '::test_checkpoint_of_another_vocabulary'),
    Mutant('supervised: a long input is found too late',
           'longt5_flax/inputs.py',
           "if options.long_inputs == 'refuse':",
           'if not options:',
           'tests/test_train_supervised.py::test_long_input_that_is_refused'),
    Mutant('examples: blank lines not counted',
           'longt5_flax/data/sources.py',
           'enumerate(stream, 1)',
           'enumerate(filter(bytes.strip, stream), 1)',
           'tests/data/test_examples.py::test_json_lines'),
    Mutant('examples: references that were asked for are missing',
           'longt5_flax/data/examples.py',
           'if field == Fields._field_defaults[name]:',
           'if field:',
           'tests/data/test_examples.py::test_fields_of_other_names'),
    Mutant('examples: empty references are none',
           'longt5_flax/data/examples.py',
           "raise BadRecordError(f'field {field!r} is an empty list')",
           'return ()',
           'tests/data/test_examples.py::test_bad_examples'),
    Mutant('examples: ids may repeat',
           'longt5_flax/data/examples.py',
           'if unique_ids and example.id in places:',
           'if False:',
           'tests/data/test_examples.py::test_id_that_was_there_before'),
    Mutant('examples: targets of blanks',
           'longt5_flax/data/examples.py',
           'if not text.strip():',
           'if not text:',
           'tests/data/test_examples.py::test_bad_examples'),
    Mutant('paper: NaturalQuestions trains on all shards',
           'longt5_flax/data/task_formats.py',
           'nq-train-????[0-8]-of',
           'nq-train-?????-of',
           'tests/data/test_paper_tasks.py::test_natural_questions'),
    Mutant('paper: TriviaQA reads in any case',
           'longt5_flax/data/task_formats.py',
           "rb'\\1', text.lower())",
           "rb'\\1', text)",
           'tests/data/test_paper_tasks.py::test_trivia_qa'),
    Mutant('paper: references of one id apart',
           'longt5_flax/data/paper_tasks.py',
           'if example.id in found and corpus.grouped:',
           'if False:',
           'tests/data/test_paper_tasks.py::test_scrolls'),
    Mutant('paper: data.tfds_name is of all tasks',
           'longt5_flax/data/paper_tasks.py',
           "tfds_name if name == task else ''",
           'tfds_name',
           'tests/data/test_paper_tasks.py::test_another_dataset_of_the_same_fields'),
    Mutant('paper: what is left out is padding',
           'longt5_flax/data/tasks.py',
           'while (example := self._example()).left_out:',
           'while (example := self._example()) is None:',
           'tests/data/test_paper_tasks.py::test_targets_that_are_empty'),
    Mutant('seqio: seed of the document ignored', 'longt5_flax/data/tasks.py',
           'tuple(int(word) % 2**32 for word in seed)', '(0, 0)',
           'tests/data/test_tasks.py::test_equals_grain_with_the_same_seeds'),
    Mutant('seqio: hosts read the same', 'longt5_flax/data/tasks.py',
           'shard_info=shard and seqio.ShardInfo(*shard)', 'shard_info=None',
           'tests/data/test_seqio_source.py'
           '::test_hosts_read_different_parts'),
    Mutant('seqio: examples of open rows lost',
           'longt5_flax/data/seqio_source.py',
           "    self._kept.set_state(state['examples'])\n", '',
           'tests/data/test_seqio_source.py::test_going_on'),
    Mutant('seqio: all examples kept', 'longt5_flax/data/seqio_source.py',
           "    self._kept.forget(self._rows.get_state()['parent']['example'])"
           '\n', '',
           'tests/data/test_seqio_source.py::test_state_stays_small'),
    Mutant('one more token than the document has',
           'longt5_flax/data/documents.py',
           'return np.array(found[:most], np.int32)',
           'return np.array(found, np.int32)',
           'tests/data/test_documents.py'
           '::test_text_is_tokenised_once_and_as_far_as_needed'),
    Mutant('objective drawn for each piece', 'longt5_flax/data/objectives.py',
           '(*seeds, 0, zlib', '(*seeds, start, zlib',
           'tests/data/test_objectives.py'
           '::test_pieces_of_a_document_have_one_objective'),
    Mutant('pieces of spans overlap', 'longt5_flax/data/objectives.py',
           'end = end if end < len(document.ids) else None',
           'end = end - 1 if end < len(document.ids) else None',
           'tests/data/test_objectives.py'
           '::test_spans_of_pieces_fill_the_inputs_and_lose_nothing'),
    Mutant('scores of the document for a part of it',
           'longt5_flax/data/gap_sentences.py',
           'if scores is None or limit < len(document):', 'if scores is None:',
           'tests/data/test_documents.py'
           '::test_stored_scores_are_of_the_whole_document_only'),
    Mutant('prepared with the default scores',
           'longt5_flax/data/shard_writer.py',
           'sentence_scores(document.words, self.scoring))',
           'sentence_scores(document.words, GapSentenceOptions()))',
           'tests/data/test_prepared.py'
           '::test_other_scoring_is_prepared_by_itself'),
    Mutant('settings of shards not compared', 'longt5_flax/data/prepared.py',
           'if made_with[name] != value:', 'if False:',
           'tests/data/test_prepared.py::test_other_scoring_is_refused'),
    Mutant('finished shards made again', 'longt5_flax/data/shard_folder.py',
           'if not self._is_whole(shard.file)]', ']',
           'tests/test_prepare.py::test_stopped_and_started_again'),
    Mutant('lead: the question counts', 'longt5_flax/lead.py',
           "text.partition('\\n\\n')[2] or text", 'text',
           'tests/test_lead.py::test_the_number_of_words_is_chosen'),
    # Loss, optimizer, step.
    Mutant('z-loss left out', 'longt5_flax/training/losses.py',
           'jnp.sum((loss + z_losses) * weights)', 'jnp.sum(loss * weights)',
           'tests/training/test_losses.py::test_equals_t5x_on_its_own_logits'),
    Mutant('head learns from the last chunk alone',
           'longt5_flax/training/losses.py',
           'jax.tree.map(jnp.add, total, (sums, by_params)), by',
           '(jax.tree.map(jnp.add, total[0], sums), by_params), by',
           'tests/training/test_losses.py::test_chunks_equal_the_whole'),
    Mutant('loss never cut into chunks', 'longt5_flax/training/losses.py',
           '  if not max_bytes:\n', '  if True:\n',
           'tests/training/test_train_step.py'
           '::test_logits_are_never_larger_than_a_chunk'),
    Mutant('layers share one parameter scale',
           'longt5_flax/training/optimizer.py',
           "return names[0] if names[1] == 'layers' else 'unstacked'",
           "return 'unstacked'",
           'tests/training/test_optimizer.py::test_three_steps'),
    Mutant('plateau off by a step', 'longt5_flax/training/schedules.py',
           'jnp.maximum(step, max(warmup_steps, 1))',
           'jnp.maximum(step + 1, max(warmup_steps, 1))',
           'tests/training/test_optimizer.py::test_schedules_are_t5x'),
    Mutant('mean of microbatch means', 'longt5_flax/training/train_step.py',
           '    return sums.loss_sum, sums\n',
           '    return sums.loss_sum / sums.weight_sum, sums\n',
           'tests/training/test_train_step.py'
           '::test_gradient_accumulation_equals_the_large_batch'),
    Mutant('last microbatch left out',
           'longt5_flax/training/train_step.py',
           'rest = jax.tree.map(lambda x: x[1:], parts)',
           'rest = jax.tree.map(lambda x: x[jnp.array([1, 1, 2])], parts)',
           'tests/training/test_train_step.py'
           '::test_gradient_accumulation_equals_the_large_batch'),
    Mutant('same dropout at every step', 'longt5_flax/training/train_step.py',
           'jax.random.fold_in(jax.random.fold_in(dropout_key, step), index)',
           'jax.random.fold_in(dropout_key, index)',
           'tests/training/test_train_step.py'
           '::test_dropout_depends_on_seed_and_step_alone'),
    Mutant('fsdp leaves the optimizer whole',
           'longt5_flax/training/partitioning.py',
           '      return axes[:i] + axes[i + 1:]\n',
           '      return (None,) * len(state_shape)\n',
           'tests/training/test_train_step.py'
           '::test_fsdp_splits_the_optimizer_like_the_parameters'),
    # Weights of other programs.
    Mutant('scanned layers along axis 0', 'longt5_flax/interop/t5x.py',
           '_SCAN_AXIS = 1', '_SCAN_AXIS = 0',
           'tests/interop/test_t5x.py::test_scanned_layers'),
    Mutant('path of older tensorstores not seen',
           'longt5_flax/interop/t5x.py', "leaf.get('path'))", 'None)',
           'tests/interop/test_t5x.py::test_index_written_in_a_bucket'),
    Mutant('heads joined in the wrong order', 'longt5_flax/interop/t5x.py',
           "if match[1] == 'out':", 'if False:',
           'tests/interop/test_t5x.py::test_kernels_with_heads_apart'),
    Mutant('missing chunks read as zeros', 'longt5_flax/interop/stores.py',
           "{'fill_missing_data_reads': False}", '{}',
           'tests/interop/test_t5x.py::test_damage_is_one_line'),
    Mutant('every layer reads the first', 'longt5_flax/interop/stores.py',
           'place.layer, *index', '0, *index',
           'tests/interop/test_orbax.py::test_layers_stacked_or_not'),
    Mutant('all tensors in memory at once', 'longt5_flax/interop/orbax.py',
           '    for value, info, arg in zip(',
           '    if values:\n'
           '      return await super().serialize(\n'
           '          [x.tensors.read(x.name) for x in values], infos, args)\n'
           '    for value, info, arg in zip(',
           'tests/interop/test_orbax.py'
           '::test_tensors_are_written_one_at_a_time'),
    Mutant('another model starts a run', 'longt5_flax/interop/same_model.py',
           'if old != new and', 'if False and',
           'tests/training/test_init_from.py::test_another_model_is_refused'),
    Mutant('HF bias tables not transposed',
           'longt5_flax/interop/huggingface_names.py',
           "('/kernel', '/rel_embedding')", "('/kernel',)",
           'tests/interop/test_huggingface.py::test_golden_folder'),
    Mutant('HF head tied as the config says',
           'longt5_flax/interop/huggingface.py',
           'tied = has_embedding and self._equals_embedding(names.HEAD)',
           'tied = config.tie_word_embeddings',
           'tests/interop/test_huggingface.py::test_head'),
    Mutant('HF scale follows the head that is stored',
           'longt5_flax/interop/huggingface.py',
           'replace(config, tie_word_embeddings=tied)',
           'replace(config, tie_word_embeddings=tied, '
           'scale_decoder_outputs=tied)',
           'tests/interop/test_huggingface.py::test_head'),
    Mutant('HF copies of the embedding not compared',
           'longt5_flax/interop/huggingface.py',
           'if not self._equals_embedding(name):', 'if False:',
           'tests/interop/test_huggingface.py::test_copies_that_differ'),
    Mutant('HF scale lost on the way out',
           'longt5_flax/interop/huggingface_folder.py',
           'self._head_scale = config.d_model ** -0.5', 'pass',
           'tests/interop/test_huggingface_folder.py::test_untied_but_scaled'),
    Mutant('HF tie kept where the output is not scaled',
           'longt5_flax/interop/huggingface_folder.py',
           'self._ours[names.HEAD] = names.OUR_EMBEDDING', 'pass',
           'tests/interop/test_huggingface_folder.py'
           '::test_tied_but_not_scaled'),
    Mutant('missing tensor not noticed', 'longt5_flax/interop/tensors.py',
           '  if missing:\n', '  if False:\n',
           'tests/interop/test_huggingface.py::test_untied_without_a_head'),
    Mutant('device reads all', 'longt5_flax/interop/tensors.py',
           'return tensors.read(where.names[0], index).astype',
           'return tensors.read(where.names[0])[index].astype',
           'tests/interop/test_tensors.py::test_each_device_reads_its_part'),
    Mutant('target written in place', 'longt5_flax/interop/atomic.py',
           'new = os.path.join(place, name)', 'new = target',
           'tests/test_convert.py::test_kill_half_way'),
    # Loop and resume, in real processes.
    Mutant('streams not restored by the loop', 'train.py',
           '    batches.set_state(streams)\n', '    pass\n',
           'tests/test_resume.py::test_a_killed_run_goes_on_bit_for_bit'),
    Mutant('optimizer not restored', 'train.py',
           '    return checkpoints, *checkpoints.restore(latest, abstract), '
           '()\n',
           '    state, streams = checkpoints.restore(latest, abstract)\n'
           '    return checkpoints, state.replace(opt_state=jax.jit('
           'optimizer.init)(state.params)), streams, ()\n',
           'tests/test_resume.py::test_a_killed_run_goes_on_bit_for_bit'),
    Mutant('lines of lost steps kept', 'longt5_flax/training/metrics.py',
           "if line['step'] < first_step]", ']',
           'tests/test_resume.py::test_a_killed_run_goes_on_bit_for_bit'),
    Mutant('steps lost at Ctrl-C', 'train.py',
           'is_last = step == config.steps or stopping',
           'is_last = step == config.steps',
           'tests/test_resume.py::test_a_stopped_run_saves_and_goes_on'),
    Mutant('finished runs of a sweep run again', 'longt5_flax/sweep.py',
           'if steps[i] == run.config.steps:', 'if False:',
           'tests/test_sweep.py::test_a_stopped_sweep_goes_on'),
    Mutant('sweep compares runs on their own rows',
           'longt5_flax/sweep_losses.py',
           '_batches(objective.config, block)',
           '_batches(configs[name], block)',
           'tests/test_sweep.py::test_results'),
    Mutant('hosts feed the same rows', 'longt5_flax/training/partitioning.py',
           '    return array[[place[row] for row in wanted]]\n',
           '    return array[[place[row] * 0 for row in wanted]]\n',
           'tests/test_processes.py'
           '::test_two_processes_give_the_losses_of_one'),
    # Hugging Face's calling conventions.
    Mutant('generate attends to padding',
           'longt5_flax/api/conditional_generation.py',
           'given_mask = ids != chosen.pad_token_id', 'pass',
           'tests/api/test_generate_method.py::test_golden_greedy'),
    Mutant('bucket filled with tokens', 'longt5_flax/api/programs.py',
           '[(0, 0)] * (x.ndim - 2))',
           '[(0, 0)] * (x.ndim - 2), constant_values=1)',
           'tests/api/test_generate_method.py'
           '::test_a_bucket_is_one_program_and_changes_nothing'),
    Mutant('decoder mask ignored', 'longt5_flax/api/models.py',
           'decoder_mask, dropout_key=key)', 'None, dropout_key=key)',
           'tests/api/test_models.py::test_decoder_mask_hides_targets'),
    Mutant('prompt mask of other rows', 'longt5_flax/model/decoding.py',
           "prompt_mask, ((0, 0), (0, after)), constant_values=True),",
           "prompt_mask[::-1], ((0, 0), (0, after)), constant_values=True),",
           'tests/api/test_generate_method.py'
           '::test_masked_part_of_a_prompt_is_not_there'),
    Mutant('start token before a masked prompt is hidden',
           'longt5_flax/api/conditional_generation.py',
           '((0, 0), (1, 0)), constant_values=True', '((0, 0), (1, 0))',
           'tests/api/test_generate_method.py'
           '::test_start_token_put_before_a_masked_prompt_is_seen'),
    Mutant('cache of other parameters', 'longt5_flax/api/models.py',
           "return 'encoded' if is_held else", "return 'encoded' if True else",
           'tests/api/test_models.py'
           '::test_other_params_than_those_of_the_cache'),
    Mutant('last hidden state before the norm', 'longt5_flax/api/models.py',
           "values['output'][0])", "layers[-1]['residual'][0])",
           'tests/api/test_golden.py::test_hidden_states_and_logits'),
    Mutant('prompt not counted', 'longt5_flax/api/generation.py',
           "values['max_length'] = max_new + prompt_length",
           "values['max_length'] = max_new",
           'tests/api/test_generate_method.py::test_a_prompt_is_part_of_max_length'),
    Mutant('narrow parameters narrow the residual stream',
           'longt5_flax/model/layers.py',
           'tokens, axis=0).astype(jnp.float32)', 'tokens, axis=0)',
           'tests/api/test_models.py::test_narrow_dtypes'),
    Mutant('dots recomputes attention', 'longt5_flax/model/layers.py',
           'save_only_these_names(ATTENDED, LAYOUT)',
           'save_only_these_names(LAYOUT)',
           'tests/model/test_remat.py::test_kernels_run_again'),
    Mutant('offload leaves inputs of layers on the device',
           'longt5_flax/model/layers.py',
           'checkpoint_name(carry, _LAYER_INPUT)', 'carry',
           'tests/model/test_remat.py'
           '::test_offload_keeps_inputs_of_layers_in_the_hosts_memory'),
    Mutant('random head where one is missing', 'longt5_flax/api/base.py',
           'tensors, model._wanted(tensors.shapes, allow_missing), '
           'allow_missing,',
           "tensors, model._wanted(tensors.shapes, ('*',)), ('*',),",
           'tests/api/test_pretrained.py'
           '::test_a_missing_head_is_an_error_unless_allowed'),
    # Generation.
    Mutant('any candidate ends', 'longt5_flax/generation/beam_search.py',
           '  counts &= np.arange(does_end.shape[1]) < beams\n', '',
           'tests/generation/test_generate.py::test_golden_beams'),
    Mutant('never is False', 'longt5_flax/generation/beam_search.py',
           'penalties[options.max_length - prompt_length]',
           'penalties[length - prompt_length]',
           'tests/generation/test_beam_search.py::test_when_it_stops'),
    Mutant('closed inputs go on', 'longt5_flax/generation/beam_search.py',
           'does_end & loop.is_open[:, None]', 'does_end',
           'tests/generation/test_beam_search.py'
           '::test_inputs_do_not_depend_on_each_other'),
    Mutant('too few candidates', 'longt5_flax/generation/beam_search.py',
           '(1 + max(1, len(options.eos_token_ids)))', '2',
           'tests/generation/test_beam_search.py'
           '::test_enough_go_on_where_most_tokens_end'),
    # Evaluation.
    Mutant('sentences of a summary on one line',
           'longt5_flax/evaluation/metrics.py', "' .\\n'", "' . '",
           'tests/evaluation/test_metrics.py::test_rouge_is_what_t5_reports'),
    Mutant('punctuation of TriviaQA without quotes',
           'longt5_flax/evaluation/metrics.py',
           'string.punctuation + _QUOTES', 'string.punctuation',
           'tests/evaluation/test_metrics.py'
           '::test_answers_are_scored_as_t5_does'),
    Mutant('the bootstrap is not paired',
           'longt5_flax/evaluation/bootstrap.py',
           'RandomState(seed)', 'RandomState()',
           'tests/evaluation/test_metrics.py'
           '::test_paired_bootstrap_sees_a_small_steady_gain'),
    Mutant('the first reference counts',
           'longt5_flax/evaluation/metrics.py',
           'max(_f1(prediction, target) for target in targets)',
           '_f1(prediction, targets[0])',
           'tests/evaluation/test_metrics.py'
           '::test_answers_are_scored_as_t5_does'),
    # Summaries and reports.
    Mutant('a cut document without its end', 'longt5_flax/summarize_inputs.py',
           'ids[len(ids) - 1 - last:]', 'ids[len(ids) - last:]',
           'tests/test_summarize.py'
           '::test_truncated_is_the_summary_of_the_beginning'),
    Mutant('pieces without their question',
           'longt5_flax/summarize_inputs.py',
           'self._head + piece + ids[-1:]', 'piece + ids[-1:]',
           'tests/test_summarize.py::test_pieces'),
    Mutant('any vocabulary for a run', 'longt5_flax/summarize.py',
           "None, '', tokenizer.vocabulary.fingerprint)",
           "run.get('fingerprint'),)",
           'tests/test_summarize.py::test_vocabularies'),
    Mutant('a prediction is HTML', 'longt5_flax/report_page.py',
           '{_escape(example["prediction"])}', '{example["prediction"]}',
           'tests/test_report.py::test_text_is_text'),
    Mutant('rates while compiling', 'longt5_flax/report_figures.py',
           'lines[1:] or lines', 'lines',
           'tests/test_report.py::test_figures_draw_what_runs_wrote'),

    Mutant('span lengths one token short',
           'longt5_flax/data/span_corruption.py',
           '> inputs_length:', '>= inputs_length:',
           'tests/data/test_span_corruption.py::test_published_lengths'),
    Mutant('a killed sweep keeps old minutes', 'longt5_flax/sweep.py',
           'folder.note(run, None, None)', 'pass',
           'tests/test_sweep.py::test_minutes_of_a_killed_sweep_are_not_known'),
    Mutant('cache not reordered', 'longt5_flax/model/decoding.py',
           "decoder['ancestors'], rows", "decoder['ancestors'], rows * 0",
           'tests/model/test_decoding.py'
           '::test_rows_of_an_input_and_their_reordering'),
    Mutant('a new token as if of another beam', 'longt5_flax/model/decoder.py',
           'jnp.arange(room) < start,',
           'jnp.arange(room) <= start,', 'tests/model/test_decoding.py'
           '::test_rows_of_an_input_and_their_reordering'),
    Mutant('keys copied for each beam', 'longt5_flax/model/decoder.py',
           '    folded = x.reshape(key.shape[0], -1, x.shape[-1])\n',
           '    mask, key, value = (y.repeat(len(x) // len(key), 0) '
           'for y in (context.cross_mask, key, value))\n'
           '    folded, context = x, context._replace(cross_mask=mask)\n',
           'tests/model/test_decoding.py'
           '::test_no_copy_of_the_encoded_for_each_beam'),
    Mutant('n-gram seen too late', 'longt5_flax/generation/scores.py',
           'np.arange(starts) + size <= length',
           'np.arange(starts) + size < length',
           'tests/generation/test_scores.py::test_adjusted_scores'),
    Mutant('rows draw alike', 'longt5_flax/generation/steps.py',
           'jnp.arange(len(scores)))', 'jnp.zeros(len(scores), int))',
           'tests/generation/test_sampling.py::test_a_key_fixes_the_draws'),
    Mutant('goes on after the last end', 'longt5_flax/generation/sampling.py',
           ' & ~jnp.all(written.done)', '',
           'tests/generation/test_generate.py'
           '::test_stops_when_all_rows_are_done'),
    # Evaluation.
    Mutant('sample reads the whole row', 'longt5_flax/samples.py',
           "_segment_ids'][row] == segment]", "_segment_ids'][row] > 0]",
           'tests/test_samples.py'),
    Mutant('padding is read', 'longt5_flax/predictions.py',
           'segment_ids[row, :len(ids)] = 1', 'segment_ids[row] = 1',
           'tests/test_predictions.py::test_devices_write_what_generate_writes'
           '[greedy]'),
    Mutant('beams leave their device', 'longt5_flax/predictions.py',
           "if mesh.size == mesh.shape['data']:", 'if mesh.size == 0:',
           'tests/test_predictions.py::test_no_beam_leaves_its_device'),
    Mutant('predictions in the order of decoding', 'longt5_flax/evaluator.py',
           'sorted(zip(numbers, texts, strict=True))',
           'zip(numbers, texts, strict=True)',
           'tests/test_eval.py::test_predictions_are_in_order'),
    Mutant('half a line is kept', 'longt5_flax/eval_folder.py',
           'os.truncate(path, end)', 'pass',
           'tests/test_eval.py::test_a_killed_evaluation_goes_on[1]'),
    Mutant('predictions of other data are replaced',
           'longt5_flax/eval_folder.py',
           "f'other {name}')\n        if not replace:",
           "f'other {name}')\n        if False:",
           'tests/test_eval.py::test_predictions_of_something_else_stay'),
    Mutant('the best of equal ones is the last', 'longt5_flax/interop/orbax.py',
           'max(sorted(scores), key', 'max(sorted(scores)[::-1], key',
           'tests/test_train_evaluation.py::test_the_best_checkpoint_stays'),
    Mutant('an evaluation that was cut off is left out', 'train.py',
           'if first_step and is_decode(first_step) and', 'if False and',
           'tests/test_train_evaluation.py'
           '::test_a_run_that_gets_no_better_ends'),
]


def passes(folder: Path, tests: list[str]) -> bool:
  """Whether all of the tests pass in a copy."""
  result = subprocess.run(
      [sys.executable, '-m', 'pytest', '-q', '-x', '-n', '0', '-p',
       'no:cacheprovider', *tests], cwd=folder, capture_output=True, text=True)
  # 1 is a failed test; anything above, a test that was not found.
  if result.returncode > 1:
    raise SystemExit(result.stdout[-2000:] + result.stderr[-2000:])
  return result.returncode == 0


def main() -> None:
  chosen = [mutant for mutant in MUTANTS if all(
      word in mutant.name for word in sys.argv[1:])]
  missed = []
  with tempfile.TemporaryDirectory() as parent:
    copy = Path(parent) / 'copy'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
        '.*', 'runs', '__pycache__'))
    if not passes(copy, sorted({mutant.test for mutant in chosen})):
      raise SystemExit('The tests fail before any mutant.')
    for mutant in chosen:
      path = copy / mutant.file
      text = path.read_text()
      if text.count(mutant.old) != 1:
        raise SystemExit(f'{mutant.name}: found {text.count(mutant.old)} times '
                         f'in {mutant.file}, must be once.')
      path.write_text(text.replace(mutant.old, mutant.new))
      caught = not passes(copy, [mutant.test])
      path.write_text(text)
      missed += [] if caught else [mutant.name]
      print(f'{"caught" if caught else "MISSED"}  {mutant.name}  '
            f'({mutant.test})', flush=True)
  print(f'{len(chosen) - len(missed)} of {len(chosen)} caught')
  sys.exit(bool(missed))


if __name__ == '__main__':
  main()
