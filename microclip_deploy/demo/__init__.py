"""Two benchmarks without any download: their images are drawn, their tiny models ship.

`objects`: animals among clutter, in drawings that the model has never seen; what saliency is for.
`letters`: letters that differ by one mark, each filling its image; what small details are. Read in
this order: `benchmark` (what both are), `objects` and `letters` (names and texts, then the
renderer), `folders` (PNG folders as a user would have them), and `bench.objects_model` and
`bench.letters_model` (how the models were made).
"""

from microclip_deploy.demo.benchmark import Benchmark
from microclip_deploy.demo.letters.benchmark import LETTERS
from microclip_deploy.demo.objects.benchmark import OBJECTS

BENCHMARKS: dict[str, Benchmark] = {each.name: each for each in (OBJECTS, LETTERS)}
