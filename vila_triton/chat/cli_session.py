"""The state of `vila-triton chat`: a conversation, the images for its next question, and commands like `/save FILE`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from PIL import Image

from ..files.reading import read_json
from ..images.processing import load_video_frames, open_image
from ..models.config import RunSettings, read_dataclass
from .conversation import ChatModel, Conversation
from .conversation_file import load_conversation, save_conversation

COMMANDS = {"/image": "FILE", "/video": "FILE", "/new": "", "/save": "FILE", "/resume": "FILE", "/quit": ""}


def default_num_frames(folder: Path) -> int:
    """Return the number of frames that the model of a folder takes of a video, without loading the model."""
    path = folder / "config.json"
    settings = read_dataclass(RunSettings, read_json(path), str(path)) if path.exists() else RunSettings()
    return settings.num_video_frames


def load_media(media: Sequence[tuple[str, str]], num_frames: int) -> list[Image.Image]:
    """Load media, given as ("image" or "video", path): images, and this many frames of each video, in their order.

    Errors: `ImageError`.
    """
    images: list[Image.Image] = []
    for media_type, path in media:
        images += [open_image(path)] if media_type == "image" else load_video_frames(path, num_frames)
    return images


@dataclass
class CliSession:
    """A conversation and the images for its next question. `num_frames` of each video are taken."""

    chat_model: ChatModel
    conversation: Conversation
    num_frames: int
    images: list[Image.Image] = field(default_factory=list)

    def run_command(self, line: str) -> None:
        """Run a line that begins with "/", except /quit, which `commands.chat` handles itself (here it would be taken
        for /resume). Errors: ValueError, OSError; the session is then as it was before.
        """
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command not in COMMANDS:
            suggestions = get_close_matches(command, COMMANDS, 1)
            hint = f"did you mean {suggestions[0]}? " if suggestions else ""
            raise ValueError(f"no command {command!r}; {hint}There are {', '.join(map(command_usage, COMMANDS))}")
        if bool(argument) != bool(COMMANDS[command]):
            raise ValueError(f"{line!r}: expected {command_usage(command)}")
        if command == "/new":
            self.conversation = Conversation(self.chat_model)
        elif command in ("/image", "/video"):
            self.images += load_media([(command[1:], argument)], self.num_frames)
        elif command == "/save":
            save_conversation(self.conversation, Path(argument))
        else:
            self.conversation = load_conversation(self.chat_model, Path(argument))


def command_usage(command: str) -> str:
    """Return a command of the chat with its argument, such as `/save FILE`."""
    return f"{command} {COMMANDS[command]}".strip()
