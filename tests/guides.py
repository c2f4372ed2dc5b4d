"""The command lines that users' guides show, with other paths, and with sizes, numbers of steps and models as small as
can be. {here} is the working folder, {models} that of the models.
"""

# The page on fine-tuning
FINE_TUNE = """
accelerate launch --num_cpu_threads_per_process 8 fine_tune.py
     --pretrained_model_name_or_path={models}/sd1.ckpt
     --in_json {here}/meta_lat.json
     --train_data_dir={here}/train_data
     --output_dir={here}/out
     --shuffle_caption
     --train_batch_size=1 --learning_rate=5e-6 --max_train_steps=10
     --use_8bit_adam --xformers --gradient_checkpointing
     --mixed_precision=bf16
     --save_every_n_epochs=4
"""
FINE_TUNE_TOML = """
accelerate launch --num_cpu_threads_per_process 1 fine_tune.py
    --pretrained_model_name_or_path={models}/sd1.safetensors
    --output_dir={here}/out
    --output_name=tuned
    --dataset_config={here}/metadata.toml
    --save_model_as=safetensors
    --learning_rate=5e-6 --max_train_steps=3
    --use_8bit_adam --xformers --gradient_checkpointing
    --mixed_precision=fp16
"""
# The page on DreamBooth
DREAMBOOTH = """
accelerate launch --num_cpu_threads_per_process 8 train_db.py
     --pretrained_model_name_or_path={models}/sd1.ckpt
     --train_data_dir={here}/train
     --reg_data_dir={here}/class
     --output_dir={here}/out
     --prior_loss_weight=1.0
     --resolution=32
     --train_batch_size=1
     --learning_rate=1e-6
     --max_train_steps=3
     --use_8bit_adam
     --xformers
     --mixed_precision="bf16"
     --cache_latents
     --gradient_checkpointing
"""
DREAMBOOTH_FASTER = """
accelerate launch --num_cpu_threads_per_process 8 train_db.py
     --pretrained_model_name_or_path={models}/sd1
     --train_data_dir={here}/train
     --reg_data_dir={here}/class
     --output_dir={here}/out
     --prior_loss_weight=1.0
     --resolution=32
     --train_batch_size=4
     --learning_rate=1e-6
     --max_train_steps=2
     --use_8bit_adam
     --xformers
     --mixed_precision="bf16"
     --cache_latents
"""
DREAMBOOTH_BUCKETS = """
accelerate launch --num_cpu_threads_per_process 8 train_db.py
     --pretrained_model_name_or_path={models}/sd1.safetensors
     --train_data_dir={here}/train
     --reg_data_dir={here}/class
     --output_dir={here}/out
     --resolution=48,32
     --train_batch_size=6 --learning_rate=5e-6 --max_train_steps=4
     --use_8bit_adam --xformers --mixed_precision="bf16"
     --save_every_n_epochs=1 --save_state --save_precision="bf16"
     --logging_dir={here}/logs
     --enable_bucket --min_bucket_reso=16 --max_bucket_reso=80 --bucket_reso_steps=16
     --color_aug --flip_aug --gradient_checkpointing --seed 42
"""
# The page on LoRA, whose data are those of the page on all scripts
LORA = """
accelerate launch --num_cpu_threads_per_process 1 train_network.py
    --pretrained_model_name_or_path={models}/sd1.safetensors
    --dataset_config={here}/class.toml
    --output_dir={here}/out
    --output_name=lora
    --save_model_as=safetensors
    --prior_loss_weight=1.0
    --max_train_steps=4
    --learning_rate=1e-4
    --optimizer_type="AdamW8bit"
    --xformers
    --mixed_precision="fp16"
    --cache_latents
    --gradient_checkpointing
    --save_every_n_epochs=1
    --network_module=networks.lora
"""
# The guide to SDXL
SDXL_FULL = """
accelerate launch  --mixed_precision bf16 --num_cpu_threads_per_process 4 sdxl_train.py
--pretrained_model_name_or_path={models}/sdxl.safetensors --output_dir={here}/out --logging_dir={here}/logs
--dataset_config={here}/full_sdxl.toml --learning_rate=5e-6 --min_bucket_reso=32 --max_bucket_reso=512
--save_model_as=safetensors --output_name=fullXL --lr_scheduler=constant_with_warmup --lr_warmup_steps=0
--train_batch_size=4 --gradient_checkpointing --max_train_steps=6 --save_every_n_epochs=1 --save_state
--mixed_precision=bf16 --save_precision=bf16 --no_half_vae --cache_text_encoder_outputs_to_disk
--cache_latents_to_disk --optimizer_type=Adafactor
--optimizer_args="scale_parameter=False","relative_step=False","warmup_init=False" --max_data_loader_n_workers=0
--xformers --bucket_reso_steps=32 --min_snr_gamma=5 --noise_offset=0.0357 --adaptive_noise_scale=0.00357
--max_token_length=225 --bucket_no_upscale --sample_sampler=euler_a --sample_prompts={here}/prompts.txt
--sample_every_n_steps=5 --full_bf16
"""
SDXL_LORA = """
accelerate launch  --mixed_precision bf16 --num_cpu_threads_per_process 4 sdxl_train_network.py
--pretrained_model_name_or_path={models}/sdxl.safetensors --output_dir={here}/out --logging_dir={here}/logs
--dataset_config={here}/masked_sdxl.toml --learning_rate=1e-6 --min_bucket_reso=64 --max_bucket_reso=1024
--save_model_as=safetensors --output_name=loraXL --lr_scheduler=constant_with_warmup --lr_warmup_steps=0
--train_batch_size=3 --max_train_steps=4 --save_every_n_epochs=1 --gradient_checkpointing --cache_latents_to_disk
--mixed_precision=bf16 --save_precision=bf16 --no_half_vae --optimizer_type=Adafactor --bucket_no_upscale
--sample_sampler=euler_a --sample_prompts={here}/prompts.txt --sample_every_n_steps=4 --masked_loss
--network_module=networks.lora
"""
# The page on SDXL, and on Textual Inversion
SDXL_SETTINGS = """
accelerate launch --num_cpu_threads_per_process 1 sdxl_train.py
    --pretrained_model_name_or_path={models}/sdxl.safetensors
    --config_file={here}/adafactor
    --dataset_config={here}/class.toml
    --output_dir={here}/out
    --max_train_steps=2
    --gradient_checkpointing --full_bf16 --mixed_precision=bf16
    --cache_text_encoder_outputs --cache_latents --no_half_vae
"""
WORD = """
accelerate launch --num_cpu_threads_per_process 1 train_textual_inversion.py
    --pretrained_model_name_or_path={models}/sd1.safetensors
    --dataset_config={here}/class.toml
    --output_dir={here}/out
    --output_name=word
    --save_model_as=safetensors
    --max_train_steps=2 --learning_rate=1e-3 --xformers --cache_latents --gradient_checkpointing
    --mixed_precision=bf16
    --token_string=hoge --init_word=girl --num_vectors_per_token=4
"""
SDXL_WORD = """
accelerate launch --num_cpu_threads_per_process 1 sdxl_train_textual_inversion.py
    --pretrained_model_name_or_path={models}/sdxl.safetensors
    --train_data_dir={here}/train
    --output_dir={here}/out
    --resolution=32 --max_train_steps=2 --learning_rate=1e-3 --mixed_precision=bf16 --no_half_vae
    --token_string=mychar4 --init_word=girl --num_vectors_per_token=2 --use_object_template
"""

# Ranks and alphas of blocks
DIMS = "2,4,4,4,8,8,8,8,12,12,12,12,16,12,12,12,12,8,8,8,8,4,4,4,2"
SMALLER = "2,2,2,2,4,4,4,4,6,6,6,6,8,6,6,6,6,4,4,4,4,2,2,2,2"

# Options that the guides explain, as they spell them, behind the shortest of their commands.
OPTIONS = (
    (LORA, "--network_dim=16 --network_alpha=16 --persistent_data_loader_workers --max_data_loader_n_workers=1"),
    (LORA, "--unet_lr=1e-4 --text_encoder_lr=5e-5 --scale_weight_norms=1 --network_train_unet_only"),
    (LORA, '--network_args "conv_dim=4" "conv_alpha=1"'),
    (
        LORA,
        '--network_args "down_lr_weight=0.5,0.5,0.5,0.5,1.0,1.0,1.0,1.0,1.5,1.5,1.5,1.5" "mid_lr_weight=2.0"'
        ' "up_lr_weight=1.5,1.5,1.5,1.5,1.0,1.0,1.0,1.0,0.5,0.5,0.5,0.5"',
    ),
    (
        LORA,
        '--network_args "block_lr_zero_threshold=0.1" "down_lr_weight=sine+.5" "mid_lr_weight=1.5"'
        ' "up_lr_weight=cosine+.5"',
    ),
    (LORA, f'--network_args "block_dims={DIMS}" "block_alphas={SMALLER}"'),
    (LORA, f'--network_args "block_dims={DIMS}" "conv_block_dims={SMALLER}"'),
    (LORA, "--config_file={here}/network.toml"),
    (LORA, "--optimizer_type=AdamW --optimizer_args weight_decay=0.01 betas=.9,.999"),
    (LORA, "--optimizer_type=DAdaptation --learning_rate=1.0 --text_encoder_lr=0.5 --unet_lr=1.0"),
    (
        LORA,
        '--optimizer_type=AdaFactor --optimizer_args "relative_step=True" "scale_parameter=True" "warmup_init=True"',
    ),
    (
        LORA,
        '--optimizer_type=adafactor --optimizer_args "relative_step=False" --lr_scheduler="constant_with_warmup"'
        " --max_grad_norm=0.0",
    ),
    (LORA, "--optimizer_type=RMSprop"),
    (LORA, "--noise_offset=0.1 --multires_noise_iterations=6 --multires_noise_discount=0.3 --min_snr_gamma=5"),
    (LORA, "--weighted_captions --clip_skip=2 --max_token_length=225 --min_timestep=10 --max_timestep=900"),
    (FINE_TUNE, "--keep_tokens=1 --dataset_repeats=2 --train_text_encoder --save_precision=float --use_safetensors"),
    (FINE_TUNE, "--gradient_accumulation_steps=2 --lr_scheduler=cosine --lr_warmup_steps=1 --mem_eff_attn"),
    (DREAMBOOTH, '--full_fp16 --mixed_precision="fp16"'),
    (DREAMBOOTH, "--stop_text_encoder_training=2 --no_token_padding --vae={models}/sd1.safetensors"),
    (DREAMBOOTH, "--save_model_as=diffusers_safetensors --shuffle_caption --caption_extension=.txt"),
)
# What prepares pictures, as it is typed: in the folder of the repository or in that of the script, also on Windows.
PREPARATION = (
    r"python finetune\make_captions.py --batch_size 8 ..\train_data",
    r"python finetune\make_captions.py --batch_size 8 --max_length 225 --seed 42 --caption_extension .cap ..\train",
    r"python tag_images_by_wd14_tagger.py --batch_size 4 ..\train_data",
    r"python tag_images_by_wd14_tagger.py --thresh 0.5 --model_dir ..\taggers --force_download ..\train_data",
    "python merge_captions_to_metadata.py train_data meta_cap.json",
    "python merge_captions_to_metadata.py --full_path train_data meta_cap.json",
    """python merge_captions_to_metadata.py --full_path
     train_data1 meta_cap1.json""",
    """python merge_captions_to_metadata.py --full_path --in_json meta_cap1.json
     train_data2 meta_cap2.json""",
    "python merge_dd_tags_to_metadata.py train_data --in_json meta_cap.json meta_cap_dd.json",
    "python merge_dd_tags_to_metadata.py --full_path train_data --in_json meta_cap.json meta_cap_dd.json",
    """python merge_dd_tags_to_metadata.py --full_path --in_json meta_cap2.json
     train_data1 meta_cap_dd1.json""",
    """python merge_dd_tags_to_metadata.py --full_path --in_json meta_cap_dd1.json
     train_data2 meta_cap_dd2.json""",
    "python3 finetune/merge_dd_tags_to_metadata.py --full_path /mnt/g/pictures /mnt/g/config/10_pictures.json",
    "python clean_captions_and_tags.py meta_cap_dd.json meta_clean.json",
    """python prepare_buckets_latents.py
     train_data meta_clean.json meta_lat.json model.ckpt
     --batch_size 4 --max_resolution 512,512 --mixed_precision no""",
    """python prepare_buckets_latents.py --full_path
     train_data2 meta_lat1.json meta_lat2.json model.ckpt
     --batch_size 4 --max_resolution 512,512 --mixed_precision no""",
    """python prepare_buckets_latents.py --full_path
     train_data meta_clean.json meta_lat.json v2.ckpt
     --v2 --max_resolution 768,768 --min_bucket_reso 384 --max_bucket_reso 1280 --flip_aug""",
    r"""python tools\resize_images_to_resolution.py --max_resolution 512x512,384x384,256x256 --save_as_png
    --copy_associated_files 元画像フォルダ 変換先フォルダ""",
    r"python tools\resize_images_to_resolution.py --divisible_by 64 --interpolation lanczos4 pictures smaller",
)
# Shown in the guides and not here: networks that are still to come (networks.dylora), an optimizer that cannot compute
# without a GPU (bitsandbytes.optim.lamb.LAMB), --block_lr, which is abridged there, and uploads, which test_upload.py
# has a hub for.
