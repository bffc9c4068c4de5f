r"""Every key of a run, with its default. All other configs are this one and a
few lines.

Override any key on the command line, as in `--config.optimizer.name=adamw`;
what was used is in the run's config.json. Unknown keys are refused.

Reproduces: nothing by itself; the defaults are the published pretraining
settings of LongT5 (Guo et al. 2021, arXiv 2112.07916; T5X's gin files), for the
base model with transient-global attention.
Command: python train.py --config=configs/base.py \
  --config.data.path=books.jsonl.xz --config.data.vocabulary=m.model
Hardware: the published batch of 128 x 4096 tokens wants 32 accelerators or
  more; see tglobal_base.py for one GPU.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  # Row order, gap sentences, initial parameters and dropout all follow from it.
  config.seed = 0
  config.steps = 1_000_000
  config.log_every_steps = 100
  # Parameters to start from; step and optimizer start anew. 'hf:DIR' is a
  # Hugging Face folder, 't5x:DIR' a T5X checkpoint (or its URL), 't5:DIR' a
  # T5.1.1 of either kind, 'orbax:DIR' and 'safetensors:FILE' what `convert`
  # writes, 'run:WORKDIR' the best checkpoint of another run (eval.keep_best) or
  # its newest, 'run:WORKDIR/checkpoints/STEP' a certain one. '' starts from the
  # initialiser.
  config.init_from = ''

  # The architecture: a preset ({local, tglobal, full, mlongt5}-{tiny, small,
  # base, large, xl, xxl}), and any field of LongT5Config to set differently.
  # A field left at None has the preset's value.
  config.model = ml_collections.ConfigDict()
  config.model.preset = 'tglobal-base'
  config.model.vocab_size = placeholder(int)
  config.model.d_model = placeholder(int)
  config.model.d_kv = placeholder(int)  # Size of one attention head.
  config.model.d_ff = placeholder(int)
  config.model.num_layers = placeholder(int)
  config.model.num_decoder_layers = placeholder(int)  # None: as num_layers.
  config.model.num_heads = placeholder(int)
  config.model.local_radius = placeholder(int)  # Tokens seen to either side.
  config.model.global_block_size = placeholder(int)  # Tokens a global token.
  config.model.relative_attention_num_buckets = placeholder(int)
  config.model.relative_attention_max_distance = placeholder(int)
  # Pretraining drops nothing; fine-tuning uses 0.1.
  config.model.dropout_rate = 0.0
  config.model.layer_norm_epsilon = placeholder(float)
  config.model.initializer_factor = placeholder(float)
  config.model.feed_forward_proj = placeholder(str)  # relu, gated-gelu
  # local, transient-global, full
  config.model.encoder_attention_type = placeholder(str)
  config.model.tie_word_embeddings = placeholder(bool)
  config.model.scale_decoder_outputs = placeholder(bool)
  config.model.pad_token_id = placeholder(int)
  config.model.eos_token_id = placeholder(int)
  config.model.decoder_start_token_id = placeholder(int)

  config.data = ml_collections.ConfigDict()
  # jsonl: one JSON object a line; tsv: one example a line, the first one names
  # columns; text: one document a file; arrayrecord: a folder of
  # longt5_flax.prepare; seqio: a task (docs/data.md).
  config.data.source = 'jsonl'
  # Files or globs, separated by commas, plain, .gz, .xz or .zst; or the folder.
  config.data.path = ''
  # Held-out documents; '' for no evaluation.
  config.data.validation_path = ''
  config.data.field = 'text'  # Of a JSON object.
  # Of objective supervised: fields or columns. References, a list of texts to
  # score by, and an id may be missing under these names: they are then the
  # targets and the number of the line.
  config.data.inputs_field = 'inputs'
  config.data.targets_field = 'targets'
  config.data.references_field = 'references'
  config.data.id_field = 'id'
  config.data.prefix = ''  # Before the inputs; LongT5 was trained without.
  # A broken line: 'raise' names file and line; 'skip' counts them.
  config.data.on_bad_record = 'raise'
  # Of source seqio: a task or mixture; the Python module that registers it, ''
  # for longt5_flax's own; and its split to evaluate on, '' for no evaluation.
  config.data.task = ''
  config.data.module = ''
  config.data.validation_split = ''
  # What longt5_flax's own tasks read: a dataset of TensorFlow Datasets in place
  # of the task's, which is '' (pretraining: c4/en:2.2.0); and the folder of
  # datasets, '' for TFDS's own.
  config.data.tfds_name = ''
  config.data.tfds_dir = ''
  config.data.task_dir = ''  # Folder of tasks that are files made by hand.
  # A SentencePiece model. '' with source seqio: the task's.
  config.data.vocabulary = ''
  # Sentinels <extra_id_n>; those that the file does not hold come after its
  # pieces, as in seqio.
  config.data.extra_ids = 100
  # gap_sentences, span_corruption, or a mix of them, drawn for each document:
  # 'gap_sentences:1,span_corruption:1'. supervised: examples of inputs and
  # targets. With source seqio the task decides.
  config.data.objective = 'gap_sentences'
  # What becomes of a document longer than the inputs. 'cut': as published, all
  # of it is scored and the input cut, so that targets may lie beyond it.
  # 'pieces': consecutive pieces, each scored by itself.
  config.data.long_documents = 'cut'
  # Supervised inputs longer than the limit, prefix and end included. 'cut_end'
  # keeps their beginning; 'cut_middle' as much of the beginning as of the end;
  # 'leave_out' does not use the example; 'refuse' ends the run. It is counted.
  config.data.long_inputs = 'cut_end'
  config.data.inputs_length = 4096
  config.data.targets_length = 910
  # Rows of a step, over all devices and microbatches.
  config.data.batch_size = 128
  # Several examples a row, each seeing only itself.
  config.data.packing = True
  # Processes that prepare rows; 0 prepares them in the training process, as
  # source seqio always does.
  config.data.workers = 4

  # T5's span corruption.
  config.span_corruption = ml_collections.ConfigDict()
  config.span_corruption.noise_density = 0.15  # Share of tokens to hide.
  config.span_corruption.mean_noise_span_length = 3.0  # In tokens.

  # PEGASUS' gap sentences as LongT5 configures them.
  config.gap_sentences = ml_collections.ConfigDict()
  # dynamic_rouge, rouge, greedy_rouge, continuous_rouge, random, lead, hybrid,
  # none
  config.gap_sentences.strategy = 'dynamic_rouge'
  # Share of sentences masked; dynamic_rouge draws between min_ratio * ratio
  # and ratio for each document.
  config.gap_sentences.ratio = 0.2
  config.gap_sentences.min_ratio = 0.33
  config.gap_sentences.ngram = 1
  config.gap_sentences.metric = 'F'  # F, precision, recall
  config.gap_sentences.option = 'standard'  # standard, deduplicate, log
  config.gap_sentences.stop_words = ()
  # dynamic_rouge multiplies scores by a fixed noise: that of the C++ library
  # 'libcxx' (the published checkpoints' in all likelihood) or 'libstdcxx', or
  # none for ''.
  config.gap_sentences.noise = 'libcxx'
  config.gap_sentences.noise_ratio = 0.2
  config.gap_sentences.mask_id = 2  # T5's <unk>, as published.
  # A selected sentence is replaced by the mask, by a random sentence, left as
  # it is, or removed.
  config.gap_sentences.probabilities = (0.9, 0.0, 0.1, 0.0)

  config.loss = ml_collections.ConfigDict()
  config.loss.z_loss = 1e-4
  config.loss.label_smoothing = 0.0
  # 'tokens': mean over the target tokens of the whole batch; 'sum': as
  # published. Adafactor does not tell them apart.
  config.loss.normalization = 'tokens'
  # Float32 logits are computed in chunks of at most so many MiB a device; 0:
  # all at once.
  config.loss.chunk_mib = 1024.0

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = 'adafactor'  # adafactor, adamw
  # Gradients are summed over so many parts of the batch.
  config.optimizer.microbatches = 1
  config.optimizer.clip_global_norm = 0.0  # 0: no clipping.
  # Adafactor.
  config.optimizer.decay_rate = 0.8
  config.optimizer.clipping_threshold = 1.0
  config.optimizer.multiply_by_parameter_scale = True
  config.optimizer.min_dim_size_to_factor = 128
  # AdamW.
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 0.0

  config.schedule = ml_collections.ConfigDict()
  # rsqrt: learning_rate / sqrt(max(step, warmup_steps)); constant, linear and
  # cosine rise linearly over warmup_steps and go on, or to 0 at `steps`.
  config.schedule.name = 'rsqrt'
  config.schedule.learning_rate = 1.0
  config.schedule.warmup_steps = 10_000

  # Devices along each axis; their product is the number of devices, and one
  # axis may be -1: whatever is left.
  config.mesh = ml_collections.ConfigDict()
  config.mesh.data = -1  # Copies of the model, each with a part of the batch.
  config.mesh.fsdp = 1  # Parts of parameters and batch alike.
  config.mesh.tensor = 1  # Parts of heads and MLP features.
  config.mesh.sequence = 1  # Parts of a row.

  config.precision = ml_collections.ConfigDict()
  config.precision.dtype = 'bfloat16'  # float32, bfloat16, float16
  # What the backward pass recomputes: none, dots (all but matrix products and
  # attention), layer (all inside a layer), offload (that too, and the inputs of
  # layers wait in the host's memory; give scan_unroll=1, without a loop TPUs
  # keep most of them).
  config.precision.remat = 'none'
  # One array of all layers in place of one a layer.
  config.precision.scan_layers = True
  # Of stacked layers so many are compiled, as one turn of a loop over them; 0:
  # all, without a loop, which compiles longer and runs faster.
  config.precision.scan_unroll = 0
  # 'reference' holds all scores; 'chunked' those of some blocks of inputs at a
  # time and recomputes them, so that memory is linear in their length; 'fused'
  # none, in kernels for NVIDIA GPUs and TPUs. 'auto' is 'fused' where
  # it runs, else 'chunked', and on a CPU 'reference' up to 8192 tokens.
  config.precision.attention = 'auto'

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every_steps = 1000
  config.checkpoint.keep = 3  # The newest so many,
  config.checkpoint.keep_every_steps = 0  # and each multiple of this; 0: none.

  # Held-out loss on data.validation_path, always the same rows.
  config.eval = ml_collections.ConfigDict()
  config.eval.every_steps = 1000
  config.eval.max_batches = 0  # 0: the whole of it.
  # Held-out documents to show at the end: a masked sentence and what the model
  # wrote in its place.
  config.eval.samples = 0
  config.eval.sample_length = 64  # Tokens that the model may write.
  # What scores predictions for the examples of data.validation_path: rouge,
  # rouge_stemmed, squad, trivia_qa, or a task of SCROLLS; '': the loss is all.
  config.eval.metric = ''
  # Predictions and scores in training, and at its end; 0: only by eval.py.
  config.eval.decode_every_steps = 0
  # In training, of the first so many examples; 0: of all, as eval.py's.
  config.eval.max_examples = 0
  config.eval.batch_size = 32  # Examples decoded at a time, over all devices.
  config.eval.num_beams = 1  # 1: greedy.
  config.eval.max_decode_length = 0  # In tokens; 0: data.targets_length.
  # A beam's score is its log-probability / tokens ** length_penalty.
  config.eval.length_penalty = 1.0
  # No n-gram of this size occurs twice; 0: no such rule.
  config.eval.no_repeat_ngram_size = 0
  # The score, such as rougeLsum, whose best checkpoint is kept besides the
  # newest ones; '': none. How many evaluations in turn may be no better before
  # the run ends; 0: any number.
  config.eval.keep_best = ''
  config.eval.patience = 0

  # A profiler trace of num_steps steps, for TensorBoard, from first_step on.
  config.profile = ml_collections.ConfigDict()
  config.profile.first_step = 10
  config.profile.num_steps = 0
  return config
