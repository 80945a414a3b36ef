"""Suggest the config key that was meant: by the names that other projects use, then by spelling.

The tables hold the names of PySlowFast, MMAction2, Lightning, timm and torchvision's scripts, and earlier names of our
own keys. A test checks that each key in them exists.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

# Our key: other names for it, in lower case. A name without a dot also matches any key that ends with ".name".
OTHER_NAMES = {
    "base.batch_size": (
        "batch_size bs batchsize global_batch_size total_batch_size train_batch_size samples_per_gpu "
        "videos_per_gpu batch_size_per_gpu train.batch_size batch"
    ),
    "base.num_frames": (
        "n_frames nframes clip_len clip_length clip_size frames_per_clip num_segments sequence_length seq_len "
        "frame_num frames"
    ),
    "base.crop_size": (
        "train_crop_size image_size img_size input_size resolution train_size side crop spatial_size size base.size"
    ),
    "base.frame_stride": ("sampling_rate frame_interval temporal_stride sample_rate frame_step tau frame_rate stride"),
    "base.short_side": (
        "train_jitter_scales jitter_scales short_side_scale min_max_scale resize_scale scale_jitter base.jitter"
    ),
    "base.epochs": "epochs max_epoch max_epochs num_epochs n_epochs total_epochs epoch num_train_epochs",
    "base.lr": "lr base_lr learning_rate init_lr initial_lr blr max_lr learningrate",
    "base.lr_milestones": "milestones steps lr_steps decay_epochs step_size lr_decay_epochs step",
    "base.gamma": "lr_gamma decay_rate lr_decay_rate lr_factor",
    "base.lr_policy": "scheduler lr_scheduler sched lr_schedule lr_config lr_scheduler_type policy",
    "base.warmup_epochs": "warmup lr_warmup_epochs warmup_iters warmup_steps warm_up_epochs",
    "base.warmup_lr": "warmup_start_lr warmup_lr_init lr_warmup_decay warmup_ratio warmup_factor warmup_bias_lr",
    "optimizer": "optimizing_method optim opt optim_wrapper optimiser optimizer_name",
    "optimizer.momentum": "sgd_momentum",
    "optimizer.weight_decay": "wd decay weightdecay l2",
    "optimizer.layer_decay": "layer_decay layerwise_lr_decay llrd",
    "optimizer.betas": "betas beta1 beta2",
    "optimizer.decay_norm_and_bias": "zero_wd_1d_param no_weight_decay paramwise_cfg",
    "loader.num_workers": (
        "workers n_workers nworkers num_threads workers_per_gpu dataloader_num_workers j num_data_workers data_workers"
    ),
    "loader.prefetch_factor": "prefetch",
    "loader.low_priority": "idle",
    "train.micro_batch_clips": (
        "micro_batch_size micro_batch microbatch accum_iter accumulate_grad_batches gradient_accumulation_steps "
        "grad_accum accumulation_steps grad_accum_steps accumulation update_freq "
        "max_clips_per_step"
    ),
    "train.clip_grad_norm": (
        "clip_grad clip_grad_norm clip_grad_l2norm clip_grad_val gradient_clip_val max_norm grad_clip clip_norm "
        "max_grad_norm gradient_clip clip_gradients optimizer.clip optimizer.clip_norm grad_clip_norm"
    ),
    "train.ema": "ema model_ema ema_decay model_ema_decay use_ema ema_momentum swa",
    "train.freeze": "freeze frozen frozen_stages linear_probe linear_probing freeze_backbone detach_final_fc",
    "train.log_every": "log_period log_interval log_every_n_steps print_freq logging_steps log_freq display_interval",
    "train.evals_per_phase": (
        "eval_period eval_interval val_interval eval_freq check_val_every_n_epoch val_check_interval eval_every "
        "val_every validate_every evaluation_interval"
    ),
    "train.precise_bn_clips": (
        "num_batches_precise use_precise_stats precise_bn precise_bn_iters num_iters_precise precise_bn_batches"
    ),
    "train.profile": "profiler profiling",
    "test.batch_size": "val_batch_size eval_batch_size test_batch_size val.batch_size test.batch",
    "test.num_clips": (
        "num_ensemble_views test_num_clips clips_per_video num_views n_clips test_clips num_sample_clips clips"
    ),
    "test.num_crops": "num_spatial_crops test_num_crop three_crop threecrop test_crops num_sample_crops crops",
    "test.crop_size": "test_crop_size val_size eval_size test_size val_crop_size test_image_size size test.size",
    "test.enable": "do_test test_after",
    "checkpoint.every_steps": (
        "checkpoint_period save_interval checkpoint_interval save_every save_freq ckpt_interval save_steps "
        "every_n_train_steps checkpoint_every save_period ckpt_freq"
    ),
    "checkpoint.keep": "max_keep_ckpts save_top_k save_total_limit checkpoint_hist keep_checkpoints keep_last",
    "tracking": "wandb use_wandb mlflow use_mlflow logger loggers tracker report_to log_wandb wandb_project",
    "resume": (
        "resume_from auto_resume resume_from_checkpoint ckpt_path resume_path resume_training resume_checkpoint"
    ),
    "init_from": (
        "pretrained checkpoint_file_path load_from weights finetune init_cfg pretrained_weights pretrained_path "
        "checkpoint_path pretrain ckpt load model_path pretrained_model from_pretrained "
        "start_checkpoint initial_checkpoint model_weights model.weights"
    ),
    "output_dir": (
        "work_dir workdir save_dir log_dir logdir default_root_dir out exp_dir out_dir save_path output "
        "experiment_dir checkpoint_dir output_path results_dir exp_name"
    ),
    "seed": "rng_seed random_seed seed_everything manual_seed random_state",
    "precision": "amp use_amp fp16 bf16 mixed_precision autocast dtype half use_fp16",
    "compile": "torch_compile torchcompile torchscript use_compile",
    "deterministic": "cudnn_deterministic use_deterministic_algorithms",
    "hang_timeout": "dist_timeout nccl_timeout ddp_timeout",
    "normalize.mean": "mean image_mean pixel_mean data.mean",
    "normalize.std": "std image_std pixel_std data.std",
    "dataset": "data data_name dataset_name train.dataset test.dataset dataset_type data_set",
    "dataset.root": (
        "path_to_data_dir path_prefix data_dir data_path data_root root dataset_path video_path video_dir "
        "dataset_root datadir data_folder videos video_root data_prefix root_dir"
    ),
    "dataset.num_classes": "num_classes nb_classes n_classes classes num_class num_labels",
    "dataset.frame_cache": "cache cache_dir frame_cache_dir",
    "model": "arch backbone network net model_name architecture model_type",
    "model.dropout": "dropout_rate dropout_ratio drop_rate drop",
    "model.depth": "resnet.depth num_layers",
    "model.width": "width_per_group base_channels num_filters",
    "augment": "aug augmentation augmentations auto_augment autoaugment aa data_augmentation",
    "augment.color_jitter": "colorjitter jitter_param",
    "augment.randaugment_ops": "rand_augment randaugment aa_type",
    "augment.erasing_prob": "random_erasing reprob re_prob",
    "augment.mixup_alpha": "mixup",
    "augment.cutmix_alpha": "cutmix",
    "augment.mix_prob": "mixup_prob",
    "augment.cutmix_prob": "switch_prob mixup_switch_prob",
    "augment.repeat": "num_sample repeated_aug aug_repeats num_aug_repeats",
    "augment.crop_area": "train_jitter_scales_relative random_resized_crop",
    "train.label_smoothing": "smoothing label_smooth_value label_smooth",
    "train.class_weights": "class_weight",
    "sampler": "train_sampler weighted_sampler balanced_sampler class_balanced",
    "schedule": "multigrid multigrid.long_cycle multigrid.short_cycle long_cycle short_cycle multigrid_schedule",
    "schedule.epoch_factor": "epoch_factor",
    "schedule.long_factors": "long_cycle_factors",
    "schedule.short_factors": "short_cycle_factors",
    "schedule.bn_group": "bn_base_size bn_group_size sub_batch_size",
    "decoder": "decoding_backend video_backend backend decode_backend video_reader",
}

# What mgvideo does instead, or that it lacks the feature: the names that other projects use for it.
NOT_A_KEY = {
    "start one process per GPU instead: torchrun --nproc-per-node=N": (
        "gpus num_gpus gpu devices gpu_ids n_gpu ngpus nproc_per_node accelerator nproc num_processes device cuda "
        "world_size gpus_per_node"
    ),
    "start the command on each node instead: torchrun --nnodes=N, or see docs/slurm.md": (
        "num_shards nodes num_nodes nnodes shard_id"
    ),
    "train.enable=false tests without training": (
        "eval_only evaluate test_only eval only_test val_only do_train do_eval"
    ),
    "there is no early stopping": "patience early_stopping early_stop early_stopping_patience",
    "set base.epochs instead; mgvideo plan shows how many steps that makes": (
        "max_steps max_iters iterations num_iters total_steps max_iter num_steps niters"
    ),
    "memory is always pinned on a GPU": "pin_memory pin_mem",
    "training clips are always shuffled": "shuffle train_shuffle",
    "ranks read their rank and address from the environment variables of torchrun or SLURM": (
        "local_rank rank master_addr master_port init_method dist_backend dist_url rdzv_endpoint"
    ),
    "BN groups follow schedule.bn_group on any number of GPUs": (
        "sync_bn syncbn sync_batchnorm norm_type num_sync_devices num_splits bn_type"
    ),
    "TensorBoard is always written": "tensorboard use_tensorboard",
}

_MIN_SIMILARITY = 0.7  # smallest ratio of difflib at which a word counts as a misspelt key
_MIN_OPTION_SIMILARITY = 0.5  # the same for a misspelt option of a group: there are few of them
_MIN_OTHER_NAME_SIMILARITY = 0.85  # the same for a misspelt name of another project: there are many of them


def _invert(table: dict[str, str]) -> dict[str, list[str]]:
    """Return name → the entries of `table` that list it."""
    entries: dict[str, list[str]] = {}
    for entry, names in table.items():
        for name in names.split():
            entries.setdefault(name, []).append(entry)
    return entries


_KEYS_BY_NAME, _SENTENCES_BY_NAME = _invert(OTHER_NAMES), _invert(NOT_A_KEY)


def suggestion(word: str, keys: Iterable[str], program_keys: Sequence[str] = ()) -> str:
    """Return the text that follows "… is not a key": the key that was meant, what to do instead, or "".

    `program_keys` are the keys of the program besides those of a run. They take precedence over other projects' names.
    """
    typed = word
    word = word.lower().replace("-", "_").lstrip("_")
    is_of_recipe = word.startswith("recipe.")  # else suggest the keys that refer to those of a recipe
    keys = [key for key in keys if is_of_recipe or not key.startswith("recipe.")]
    last = word.rpartition(".")[2]
    if close := _most_similar(word, program_keys, _MIN_SIMILARITY):
        return _did_you_mean(close)
    for name in dict.fromkeys((word, last)):
        if name in keys and name != typed:
            return _did_you_mean([name])
        existing = [key for key in _KEYS_BY_NAME.get(name, []) if key in keys]
        if existing:
            return _did_you_mean(existing)
        if name in _SENTENCES_BY_NAME:
            return f": {_SENTENCES_BY_NAME[name][0]}"
    return _did_you_mean(_with_last_part(last, keys) or _similar(word, keys) or _similar_other_name(word, keys))


def option_suggestion(word: str, options: Iterable[str]) -> str:
    """Return the text that follows "… does not exist": the option that is spelt most like `word`, or ""."""
    return _did_you_mean(_most_similar(word, options, _MIN_OPTION_SIMILARITY))


def _most_similar(word: str, words: Iterable[str], min_similarity: float) -> list[str]:
    """Return a list of the one word that is spelt most like `word`, empty if none is similar enough."""
    return difflib.get_close_matches(word, list(words), n=1, cutoff=min_similarity)


def _did_you_mean(keys: Sequence[str]) -> str:
    return f", did you mean {' or '.join(keys[:3])}?" if keys else ""


def _with_last_part(last: str, keys: Sequence[str]) -> list[str]:
    """Return the keys whose last part is `last`; of these only the least nested."""
    matches = [key for key in keys if key.rpartition(".")[2].lower() == last]
    return [key for key in matches if key.count(".") == min(match.count(".") for match in matches)]


def _similar(word: str, keys: Sequence[str]) -> list[str]:
    """Return keys whose last part is spelt like that of `word`; where `word` has a block, the block must match too."""
    block, _, last = word.rpartition(".")
    keys = _in_block(block, keys)
    close = _most_similar(last, {key.rpartition(".")[2] for key in keys}, _MIN_SIMILARITY)
    return _with_last_part(close[0], keys) if close else []


def _similar_other_name(word: str, keys: Sequence[str]) -> list[str]:
    """Return keys that have another name spelt like the last part of `word`, in the same block as `_similar`."""
    block, _, last = word.rpartition(".")
    close = _most_similar(last, _KEYS_BY_NAME, _MIN_OTHER_NAME_SIMILARITY)
    return _in_block(block, [key for name in close for key in _KEYS_BY_NAME[name] if key in keys])


def _in_block(block: str, keys: Sequence[str]) -> list[str]:
    """Return the keys of the block that is spelt like `block`; all keys if `block` is empty."""
    return [key for key in keys if not block or _similarity(block, key.rpartition(".")[0]) >= _MIN_SIMILARITY]


def _similarity(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()
