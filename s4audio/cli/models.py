"""`s4audio models`: the models that come with the package."""

from s4audio import checkpoint
from s4audio.cli.arguments import Parser
from s4audio.cli.info import print_table


def models(arguments: list[str]) -> None:
    """Prints the names of the pretrained models, and what they are."""
    parser = Parser(prog="s4audio models", description="The pretrained models of this installation, which work offline.")
    parser.parse_args(arguments)
    names = checkpoint.pretrained()
    if not names:
        print("this installation comes without pretrained models")
        return
    rows = [("name", "kind", "rate", "labels", "size")]
    for name in names:
        config = checkpoint.read_config(name)
        classes, size = config["arguments"].get("classes", ()), (checkpoint.PRETRAINED / name / checkpoint.WEIGHTS).stat()
        rate = f"{config['arguments'].get('sample_rate', 0):,} Hz"
        rows.append((name, config["class"], rate, ", ".join(classes) or "none", f"{size.st_size / 1e6:.1f} MB"))
    print_table(rows)
    print(f"\nmake sound: s4audio generate {names[0]} --from noise; their cards: {checkpoint.PRETRAINED}/NAME/README.md")
