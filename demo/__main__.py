"""python -m demo: a real sentence encoder, then a decoder of 1 B parameters, before and after replace_linear."""

from rich.console import Console

from demo import decoder, minilm

console = Console()
console.rule("all-MiniLM-L6-v2: real weights, real sentences")
minilm.main(console)
console.rule("a Llama-shaped decoder of 1 B parameters, random weights")
decoder.main(console)
