"""What a chat on the command line has in hand, and the lines that begin with "/"."""

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

COMMANDS = {"/image": "PICTURE", "/video": "FILE", "/new": "", "/save": "FILE", "/resume": "FILE", "/quit": ""}
DEFAULT_NUM_FRAMES = RunSettings.num_video_frames


def default_num_frames(folder: Path) -> int:
    """How many frames of a video the model of a folder is shown; read without loading it."""
    path = folder / "config.json"
    return (
        read_dataclass(RunSettings, read_json(path), str(path)).num_video_frames
        if path.exists()
        else DEFAULT_NUM_FRAMES
    )


def load_media(media: Sequence[tuple[str, str]], num_frames: int) -> list[Image.Image]:
    """Images and n frames of each video, given as (kind, path), in their order. Errors: `ImageError`."""
    clips = [
        [open_image(path)] if media_type == "image" else load_video_frames(path, num_frames)
        for media_type, path in media
    ]
    return [image for clip in clips for image in clip]


@dataclass
class CliSession:
    """A conversation, and the pictures for its next question."""

    chat_model: ChatModel
    conversation: Conversation
    num_frames: int
    images: list[Image.Image] = field(default_factory=list)

    def run_command(self, line: str) -> None:
        """A line that is no question. Errors: ValueError, OSError; nothing has changed then."""
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
    return f"{command} {COMMANDS[command]}".strip()
