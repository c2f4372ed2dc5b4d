"""What of a run is kept on the Hugging Face hub, too."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError, suggest
from library.options.base import option

REPO_TYPES = ("model", "dataset", "space")


@dataclass(frozen=True)
class HubOptions:
    """Uploads, and states to go on from. Front ends write an empty text for what is not set."""

    title: ClassVar[str] = "hub"

    huggingface_repo_id: str | None = option(
        None, "also upload what is saved to this repository of the hub, made if missing", metavar="OWNER/NAME"
    )
    huggingface_repo_type: str | None = option(
        None, f"what kind of repository it is: {', '.join(REPO_TYPES)}; model when left out", metavar="TYPE"
    )
    huggingface_path_in_repo: str | None = option(
        None, "folder in the repository; its root when left out", metavar="FOLDER"
    )
    huggingface_token: str | None = option(
        None,
        "access token; HF_TOKEN or `hf auth login` are safer, others see this one in the list of processes",
        metavar="TOKEN",
        secret=True,
    )
    huggingface_repo_visibility: str | None = option(
        None, "public, or anything else for a private one; only counts when it is made", metavar="VISIBILITY"
    )
    save_state_to_huggingface: bool = option(False, "upload saved states, too")
    resume_from_huggingface: bool = option(
        False, "--resume names a folder of the hub: owner/name/folder:revision:type, the last two may be left out"
    )
    async_upload: bool = option(False, "train on during an upload")

    def __post_init__(self) -> None:
        if self.repo_type not in REPO_TYPES:
            raise UserError(
                f"--huggingface_repo_type: {self.repo_type} is none of {', '.join(REPO_TYPES)}"
                f"{suggest(self.repo_type, REPO_TYPES)}"
            )
        if self.token and not (self.token.isascii() and self.token.isprintable() and " " not in self.token):
            raise UserError("--huggingface_token: the value is no access token, copy it anew from the hub's settings")
        if any(part in (".", "..") for part in self.folder.split("/")):
            raise UserError(
                f"--huggingface_path_in_repo: {self.huggingface_path_in_repo} is no folder of a repository, give its "
                "path from the root, without . and .."
            )

    @property
    def uploads(self) -> bool:
        return bool(self.huggingface_repo_id)

    @property
    def repo_type(self) -> str:
        return self.huggingface_repo_type or "model"

    @property
    def public(self) -> bool:
        return self.huggingface_repo_visibility == "public"

    @property
    def token(self) -> str | None:
        """The token given, None to have the hub's library look for one."""
        return (self.huggingface_token or "").strip() or None

    @property
    def folder(self) -> str:
        """The folder in the repository without slashes around it, "" for the root."""
        return (self.huggingface_path_in_repo or "").strip("/")
