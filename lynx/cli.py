"""The ``lynx`` command."""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from lynx import LynxForConditionalGeneration, LynxProcessor

_PRESET_HELP = "how to search, as in the paper: open-vqa-image, open-vqa-video, owleval or demo"
_OF_THE_DEMO = {"matplotlib", "sklearn"}  # modules; where others are lacking the error says what brings them


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 2 after an error that a person can mend, of which one line tells; 130 after an interrupt.
    """
    options = _options(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        options.run(options)
    except (OSError, ValueError) as error:
        _say(f"lynx {options.command}: {error}")
        return 2
    except ModuleNotFoundError as error:
        advice = "; pip install 'lynx-kernels[demo]' brings it" if error.name in _OF_THE_DEMO else ""
        _say(f"lynx {options.command}: {error}{advice}")
        return 2
    except KeyboardInterrupt:
        print(f"lynx {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _say(text: str) -> None:
    """Print an error; one that all ranks of a run meet, once."""
    from lynx.train.ranks import is_first_to_say

    if is_first_to_say(text):
        print(text, file=sys.stderr)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser, commands = _parser()
    # Python 3.11 gives the files of ask that stand after its options back as unknown.
    options, rest = parser.parse_known_args(arguments)
    if rest and (options.command != "ask" or any(each.startswith("-") for each in rest)):
        commands[options.command].error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.image += rest
    return options


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The command's parser, and those of its commands."""
    parser = argparse.ArgumentParser(prog="lynx", description="Train Lynx models and ask them about images and videos.")
    commands = parser.add_subparsers(dest="command", required=True)

    ask = commands.add_parser(
        "ask",
        help="answer questions about image and video files",
        usage="%(prog)s [options] MODEL IMAGE... QUESTION\n"
        "       %(prog)s [options] MODEL [IMAGE...] [-i IMAGE...]... -q QUESTION [-q QUESTION]...",
        description="Every question is asked about every item. An item is an image or video file, or several images, "
        "which are a video's frames.",
    )
    ask.add_argument("model", type=Path, help="a model folder")
    ask.add_argument("image", nargs="*", help="the files of an item; without -q the last argument is the question")
    ask.add_argument(
        "--image", "-i", dest="items", nargs="+", action="append", default=[], metavar="IMAGE", help="one more item"
    )
    ask.add_argument(
        "--question", "-q", dest="questions", action="append", default=[], metavar="QUESTION", help="a question"
    )
    ask.add_argument("--preset", metavar="NAME", help=_PRESET_HELP + " (default: greedy)")
    ask.add_argument(
        "--beams", type=_positive, metavar="N", help="beams to search with (default: the preset's, or 1: greedy)"
    )
    ask.add_argument(
        "--max-new-tokens", type=_positive, metavar="N", help="of an answer (default: the preset's, or 64)"
    )
    ask.add_argument(
        "--describe-first", action="store_true", help="have the model describe every item before it answers"
    )
    ask.add_argument("--keep-case", action="store_true", help="do not lower-case the questions")
    ask.add_argument("--seed", type=int, help="of answers that are drawn at random (default: another one each time)")
    ask.set_defaults(run=_ask)

    train = commands.add_parser(
        "train",
        help="train as a recipe says",
        epilog="lynx train tiny data=my.jsonl output=my-model steps=1000; the same command goes on after a crash.",
    )
    train.add_argument("recipe", help="a YAML file, or a recipe that comes with the package, such as tiny or lynx")
    train.add_argument(
        "changes", nargs="*", metavar="key=value", help="changes to the recipe: steps=10, finetune.steps=5"
    )
    train.add_argument("--fresh", action="store_true", help="start anew, and remove what the output folder holds")
    train.set_defaults(run=_train)

    plot = commands.add_parser("plot", help="draw the curves of a training run")
    plot.add_argument("folder", type=Path, metavar="run", help="the run's output folder")
    plot.add_argument("--to", type=Path, help="the PNG to write (default: curves.png in the folder)")
    plot.set_defaults(run=_plot)

    evaluate = commands.add_parser(
        "evaluate",
        help="ask a JSONL file's questions and count the right answers",
        description="Asks every question and counts, for each type of question, the right answers, with a 95 % "
        "interval. An answer is right if it is one that the file gives, case aside; with a judge, if it implies one.",
        epilog="Open-VQA as in the paper: lynx evaluate MODEL Open_VQA_images.jsonl --root FOLDER "
        "--preset open-vqa-image --judge FOLDER",
    )
    evaluate.add_argument("model", type=Path, help="a model folder")
    evaluate.add_argument("data", type=Path, help="data as train reads it, or an annotation file of Open-VQA")
    evaluate.add_argument("--root", type=Path, help="the folder of the images (default: the data file's)")
    evaluate.add_argument("--preset", metavar="NAME", help=_PRESET_HELP + " (default: greedy)")
    evaluate.add_argument(
        "--judge", type=Path, metavar="FOLDER", help="the folder of a language model that judges the answers"
    )
    evaluate.add_argument("--answers", type=Path, metavar="FILE", help="write every answer into this JSONL file")
    evaluate.add_argument("--sheet", type=Path, metavar="FILE", help="draw the first 24 answers into this PNG")
    evaluate.set_defaults(run=_evaluate)

    convert = commands.add_parser("convert", help="make a model folder from the release's checkpoint files")
    convert.add_argument("checkpoint", type=Path, help="finetune_lynx.pt or another file in its layout")
    convert.add_argument("output", type=Path, help="the folder to save the model in")
    convert.add_argument("--vision", type=Path, help="EVA ViT-g's checkpoint, where the first file lacks the tower")
    convert.add_argument("--llm", type=Path, help="Vicuna's folder or file, where the first file lacks the decoder")
    convert.add_argument("--tokenizer", type=Path, help="the folder of Vicuna's tokenizer, for lynx ask and train")
    convert.add_argument("--image-size", type=_positive, help="in pixels (default: that of the position embedding)")
    convert.add_argument(
        "--config", type=Path, help='JSON of what is not as in the release: {"text_config": {...}, ...}'
    )
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: as in the files)")
    convert.set_defaults(run=_convert)

    demo = commands.add_parser("demo", help="train and test a small model on real handwritten digits")
    demo.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)
    return parser, commands.choices


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _load(folder: Path) -> "tuple[LynxForConditionalGeneration, LynxProcessor]":
    import torch

    from lynx import checkpoint

    model, processor = checkpoint.load(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not (is_finite := value.isfinite()).all():
            raise ValueError(
                f"{folder}: {value.numel() - int(is_finite.sum())} of the {value.numel()} values of {name} are NaN or "
                "infinite, and perhaps others: the model cannot answer. Take a checkpoint from before its training "
                "went wrong"
            )
    return model, processor


def _ask(options: argparse.Namespace) -> None:
    import torch

    from lynx.generation.answers import GENERATION_PRESETS, check_preset, describe_first, generate_answers
    from lynx.generation.streaming import AnswerStreamer

    images, questions = options.image, options.questions
    if not questions and images:
        *images, question = images
        questions = [question]
    items = [item for item in (images, *options.items) if item]
    if not questions or not items:
        raise ValueError(
            "name at least one image and one question; with -i the question needs -q. 'lynx ask --help' shows how"
        )
    parts = [_part(item) for item in items]
    search = {"num_beams": options.beams, "max_new_tokens": options.max_new_tokens}
    search = {name: value for name, value in search.items() if value is not None}
    check_preset(options.preset)
    model, processor = _load(options.model)
    if options.keep_case:
        processor.lowercase = False
    if options.seed is not None:
        torch.manual_seed(options.seed)
    conversations = [
        [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
        for part in parts
        for question in questions
    ]
    if options.describe_first:
        conversations = describe_first(model, processor, conversations)
    samples = [processor.encode(messages) for messages in conversations]
    about = [f"{' '.join(map(str, item))}: {question}" for item in items for question in questions]
    titles = about if len(about) > 1 else None
    beams = search.get("num_beams", GENERATION_PRESETS.get(options.preset, {}).get("num_beams", 1))
    streams = beams == 1  # with several beams the answer is not known before the end
    if streams:
        search["streamer"] = AnswerStreamer(processor, titles)
    start = time.perf_counter()
    answers = generate_answers(model, processor, samples, preset=options.preset, **search)
    seconds = time.perf_counter() - start
    for number, each in enumerate([] if streams else answers):
        print(each.text if titles is None else f"{titles[number]}\n{each.text}")
    tokens = sum(len(each.token_ids) for each in answers)
    print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)


def _part(item: list[str]) -> dict[str, Any]:
    """An item as a part of a message; several files are a video's frames."""
    from lynx.media.images import load_image
    from lynx.media.videos import is_video_file

    videos = [file for file in item if is_video_file(file)]
    if videos and len(item) > 1:
        raise ValueError(
            f"{videos[0]} is a video, an item of its own: put -i before each item, and -q before the question"
        )
    if videos:
        return {"type": "video", "video": videos[0]}
    # A path, so that no name is taken for base64; of a URL load_image says that it is never fetched.
    frames = [load_image(file if "://" in file else Path(file)) for file in item]
    return {"type": "video", "video": frames} if len(frames) > 1 else {"type": "image", "image": frames[0]}


def _train(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from lynx.train import recipe
    from lynx.train.run import run

    logging.getLogger("lynx.train").setLevel(logging.INFO)
    folder = run(recipe.load(options.recipe, options.changes), fresh=options.fresh)
    ranks = PartialState()
    if folder is not None and ranks.is_main_process:
        print(folder)
    ranks.destroy_process_group()


def _plot(options: argparse.Namespace) -> None:
    from lynx.train import curves
    from lynx.train.folder import RunFolder

    path = options.to or options.folder / "curves.png"
    curves.draw(RunFolder(options.folder).log, path)
    print(path)


def _evaluate(options: argparse.Namespace) -> None:
    from lynx.eval import accuracy, judge, questions
    from lynx.generation.answers import check_preset

    check_preset(options.preset)
    for file in (options.answers, options.sheet):
        if file is not None and not file.parent.is_dir():
            raise FileNotFoundError(f"{file}: there is no folder {file.parent} to write it into")
    judges = judge.same_words if options.judge is None else judge.LanguageModelJudge(options.judge)
    model, processor = _load(options.model)
    asked, skipped = questions.read(options.data, options.root, encode=processor.encode)
    with _answers_kept(options.answers) as path:
        answered = accuracy.answer_questions(model, processor, asked, judge=judges, preset=options.preset, answers=path)
    print(accuracy.table(accuracy.scores(answered)))
    if skipped:
        print(f"skipped, and not counted: {len(skipped)}; the first one: {skipped[0]}")
    if options.answers is not None:
        accuracy.write(answered, options.answers)
        print(options.answers)
    if options.sheet is not None:
        from lynx.eval import sheet

        sheet.answer_sheet(answered[:24], options.sheet)
        print(options.sheet)


@contextmanager
def _answers_kept(path: Path | None) -> Iterator[Path]:
    """The file for answers that are not judged yet, ``path`` or a new one; where there is an error, it says which."""
    handle, name = tempfile.mkstemp(prefix="lynx-answers-", suffix=".jsonl") if path is None else (None, str(path))
    if handle is not None:
        os.close(handle)
    kept = Path(name)
    before = kept.read_bytes() if kept.exists() else None
    try:
        yield kept
    except BaseException:
        if kept.exists() and kept.read_bytes() not in (before, b""):
            print(f"lynx evaluate: the answers so far, not judged, are in {kept}", file=sys.stderr)
        elif handle is not None:
            kept.unlink()
        raise
    if handle is not None:
        kept.unlink()


def _convert(options: argparse.Namespace) -> None:
    import torch

    from lynx import checkpoint

    model = checkpoint.convert(
        options.checkpoint,
        options.output,
        vision=options.vision,
        language_model=options.llm,
        tokenizer=options.tokenizer,
        config=options.config,
        image_size=options.image_size,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
    )
    config = model.config
    print(
        f"{config.vision_config.num_hidden_layers} vision blocks at {config.vision_config.image_size} px, "
        f"{config.text_config.num_hidden_layers} layers with adapters every {config.adapter_frequency}, "
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters in {model.dtype}"
    )
    print(options.output)


def _demo(options: argparse.Namespace) -> None:
    from lynx.demo import demo

    scores = demo(options.folder, seed=options.seed)
    missed = [
        f"{kind}: {score.accuracy:.1%}"
        for kind, score in scores.items()
        if score.accuracy < (0.95 if kind == "which digit" else score.majority + 0.2)
    ]
    if missed:
        raise ValueError(f"the model learned less than it should have: {', '.join(missed)}")


if __name__ == "__main__":
    sys.exit(main())
