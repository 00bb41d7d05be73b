"""What is asked for of a passage, each with the examples that a base model goes on from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """A kind of text that is written of a passage: its name, and passages with one each."""

    name: str
    examples: tuple[tuple[str, str], ...]

    @property
    def shown(self) -> str:
        """The examples, as a passage and its question go on from them."""
        return "".join(
            f"Passage: {passage}\n{self.name}: {question}\n\n"
            for passage, question in self.examples
        )


FORMS = (
    Form(
        "Question",
        (
            (
                "The Amazon rainforest covers most of the Amazon basin of South America. This "
                "basin encompasses 7,000,000 km2, of which 5,500,000 km2 are covered by the "
                "rainforest.",
                "how large is the amazon rainforest",
            ),
            (
                "After the war Meyer returned to Berlin, where he taught chemistry until his death "
                "in 1951. His students remembered him as strict but fair.",
                "where did meyer teach chemistry",
            ),
            (
                '"Blue Harbour" is the second single from the band\'s third album. It was released '
                "in May 1994 and reached number 12 in Norway.",
                "when was blue harbour released",
            ),
            (
                "The steam engine was improved by James Watt, who added a separate condenser. It "
                "made the engine far more efficient and drove the Industrial Revolution.",
                "who improved the steam engine with a separate condenser",
            ),
        ),
    ),
    Form(
        "Search",
        (
            (
                "The bending strength of concrete beams was measured after an hour of fire. The "
                "results agree with theory where the steel is covered well.",
                "what measurements are there of the strength of concrete beams after a fire",
            ),
            (
                "The village school was closed in 1967 when the county built a larger one in the "
                "next town. Its building has been a museum of rural life since 1980.",
                "closure of small village schools and later use of their buildings",
            ),
            (
                "The parasite spends part of its life in snails and infects people who bathe in "
                "lakes. Treatment with a single dose of the drug cures most patients.",
                "how are people infected with parasites from snails, and how is it treated",
            ),
            (
                "The strike began in the shipyards and spread to the railways within a week. The "
                "government sent troops, and four workers were killed.",
                "strikes of railway and shipyard workers put down by troops",
            ),
        ),
    ),
)
