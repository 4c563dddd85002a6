from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import Sam

from tinysam.modeling.checkpoint import (
    CheckpointError,
    load,
    load_weights,
    read_metadata,
    save_checkpoint,
    with_image_size,
)
from tinysam.modeling.registry import CONFIGS, SamConfig, ViTConfig, build_sam, sam_model_registry

SMALL_VIT = SamConfig(
    image_size=64,
    prompt_embed_dim=16,
    decoder_mlp_dim=32,
    encoder=ViTConfig(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,)),
)


def public_name(key: str) -> str:
    """Our names as the public TinyViT code writes them."""
    name = key.removeprefix("image_encoder.backbone.")
    if name == key:
        return key
    name = name.replace(".conv.", ".c.")
    name = name.replace("patch_embed.conv1.", "patch_embed.seq.0.").replace("patch_embed.conv2.", "patch_embed.seq.2.")
    for stage in (1, 2, 3):
        name = name.replace(f"stages.{stage}.downsample.", f"layers.{stage - 1}.downsample.")
    return "image_encoder." + name.replace("stages.", "layers.")


@pytest.fixture(scope="module")
def public_tinysam(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sam]:
    """A file of mobile_sam.pt's and tinysam_42.3.pth's layout, head included, and the model whose weights it holds."""
    torch.manual_seed(1)
    sam = sam_model_registry["vit_t"]()
    state = {public_name(key): torch.randn_like(value) if value.is_floating_point() else value
             for key, value in sam.state_dict().items()}  # fmt: skip
    sam.load_state_dict({key: state[public_name(key)] for key in sam.state_dict()})
    state["image_encoder.norm_head.weight"] = torch.ones(320)
    state["image_encoder.head.weight"] = torch.ones(1000, 320)
    path = tmp_path_factory.mktemp("public") / "mobile_sam.pt"
    torch.save(state, path)
    return path, sam


def test_public_tinysam_files_load_by_their_key_layout(public_tinysam: tuple[Path, Sam]) -> None:
    path, expected = public_tinysam
    loaded = load(str(path))
    assert loaded.config == CONFIGS["vit_t"]
    for key, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_public_names_of_every_block_are_known(public_tinysam: tuple[Path, Sam]) -> None:
    names = torch.load(public_tinysam[0], weights_only=True).keys()
    for expected in (
        "image_encoder.patch_embed.seq.0.c.weight",
        "image_encoder.patch_embed.seq.2.bn.running_var",
        "image_encoder.layers.0.blocks.0.conv1.c.weight",
        "image_encoder.layers.0.downsample.conv2.bn.weight",
        "image_encoder.layers.2.downsample.conv3.c.weight",
        "image_encoder.layers.3.blocks.1.attn.attention_biases",
        "image_encoder.layers.1.blocks.0.local_conv.c.weight",
        "image_encoder.neck.0.weight",
    ):
        assert expected in names


def test_own_checkpoints_carry_their_config(tmp_path: Path, tiny_sam: Sam) -> None:
    path = str(tmp_path / "deep" / "tiny.safetensors")
    save_checkpoint(tiny_sam, path, {"seed": "7"})
    loaded = load(path)
    assert loaded.config == tiny_sam.config
    assert not loaded.training
    assert read_metadata(path)["seed"] == "7"
    for key, value in tiny_sam.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_half_precision_files_load_as_float32(tmp_path: Path, tiny_sam: Sam) -> None:
    path = tmp_path / "half.safetensors"
    save_checkpoint(tiny_sam, str(path), dtype=torch.float16)
    loaded = load(str(path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded.image_encoder(image), tiny_sam.image_encoder(image), rtol=0.02, atol=0.02)


def test_sam_weights_fit_another_image_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sam = build_sam(SMALL_VIT)
    path = str(tmp_path / "vit.safetensors")
    save_checkpoint(sam, path)
    larger = with_image_size(sam, 128)
    assert larger.image_encoder(torch.randn(1, 3, 128, 128)).shape == (1, 16, 8, 8)
    again = with_image_size(larger, 64)
    assert again.image_encoder.pos_embed.shape == sam.image_encoder.pos_embed.shape
    other = build_sam(larger.config)
    load_weights(other, path)
    torch.testing.assert_close(other.image_encoder.pos_embed, larger.image_encoder.pos_embed)


def test_weights_of_another_model_are_refused_with_keys_and_shapes(tmp_path: Path, tiny_sam: Sam) -> None:
    path = str(tmp_path / "tiny.safetensors")
    save_checkpoint(tiny_sam, path)
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors.*\n.*(missing|expected)"):
        sam_model_registry["vit_t"](checkpoint=path)


def test_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (marker,))  # type: ignore[return-value]

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"image_encoder.pos_embed": Payload()}))
    with pytest.raises(CheckpointError, match="without unpickling"):
        load(str(path))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.safetensors", b"\x08\x00", "Is the download complete"),
        ("broken.pth", b"PK\x03\x04 not a zip", "Is the download complete"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load(str(tmp_path / name))


def test_missing_files_and_names_without_weights_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tinysam weights"):
        load(str(tmp_path / "nowhere.pth"))
    with pytest.raises(CheckpointError, match="architecture without weights"):
        load("vit_h")


def test_foreign_state_dicts_are_described(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.ones(3)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"conv\.weight"):
        load(str(tmp_path / "resnet.pth"))
