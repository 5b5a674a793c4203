"""The example jobs' data: reviews in three languages, and questions with their answers. All of it is CC0.

`python texts.py` writes reviews.parquet and questions.parquet beside this file.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent

# Product, stars, language, text.
REVIEWS = [
    ("kettle", 5, "en", "Boils a litre in under three minutes and the handle stays cool. I bought a second one."),
    ("kettle", 1, "en", "The lid broke off after a week. The shop answered my letter a month later, with a form."),
    ("kettle", 2, "de", "Der Deckel klemmt, und das Wasser schmeckt auch nach zwei Wochen noch nach Kunststoff."),
    ("kettle", 4, "fr", "Chauffe vite et sans bruit. Le cordon est seulement un peu court pour ma cuisine."),
    ("desk lamp", 5, "en", "Warm light, a heavy foot that does not slide, and it folds flat when I travel."),
    ("desk lamp", 3, "en", "Good light. The switch sits on the cable behind the desk, where nobody can reach it."),
    ("desk lamp", 1, "de", "Kam ohne Netzteil an. Auf der Schachtel steht, es liege bei. Ich habe sie zurückgegeben."),
    ("desk lamp", 4, "fr", "La lumière est douce et le bras tient bien en place, même tourné vers le mur."),
    ("tent", 4, "en", "Kept us dry through two nights of rain. Packing it back into its bag takes two people."),
    ("tent", 1, "en", "Three of the twelve pegs bent in soft ground, and a seam let water in above my head."),
    ("tent", 5, "de", "In zehn Minuten aufgebaut, auch bei Wind. Innen bleibt es trocken und hell."),
    ("tent", 2, "fr", "Trop lourde pour la randonnée : la balance dit quatre kilos, la fiche en annonce trois."),
    ("rain jacket", 5, "en", "Light, no crackling when I walk, and the hood follows my head when I look around."),
    ("rain jacket", 2, "en", "Dry for the first hour. After that my shoulders were wet, the pockets were ponds."),
    ("rain jacket", 3, "de", "Hält dicht, aber der Reißverschluss hakt jedes Mal an derselben Stelle."),
    ("rain jacket", 4, "fr", "La coupe est bonne et les poches sont grandes. La couleur est plus foncée que prévu."),
    ("bread knife", 5, "en", "Cuts a crust without crushing the crumb. It has not needed sharpening in two years."),
    ("bread knife", 1, "en", "Rust along the teeth after one wash by hand. A knife should survive a little water."),
    ("bread knife", 4, "de", "Liegt gut in der Hand und schneidet sauber. Eine Hülle für die Klinge fehlt."),
    ("bread knife", 3, "fr", "Le couteau coupe bien, mais le manche en bois a perdu son vernis dès le premier mois."),
    ("bicycle bell", 5, "en", "One clear, friendly tone. People step aside and smile instead of jumping."),
    ("bicycle bell", 2, "en", "The spring gave up in the first frost. Since then I have to say ting myself."),
    ("bicycle bell", 4, "de", "Laut genug für die Stadt und in einer Minute ohne Werkzeug befestigt."),
    ("bicycle bell", 1, "fr", "Elle ne sonne plus dès qu'il pleut, c'est-à-dire les jours où j'en ai besoin."),
]  # fmt: skip

# Topic, question, the one right answer.
QUESTIONS = [
    ("arithmetic", "What is 7 times 8?", "56"),
    ("arithmetic", "What is 144 divided by 12?", "12"),
    ("arithmetic", "What is 15 percent of 200?", "30"),
    ("arithmetic", "What is 81 minus 27?", "54"),
    ("arithmetic", "How many minutes are two and a half hours?", "150"),
    ("arithmetic", "What is the square root of 169?", "13"),
    ("geography", "Which city is the capital of Portugal?", "Lisbon"),
    ("geography", "Which river flows through Vienna, Budapest and Belgrade?", "Danube"),
    ("geography", "On which continent lies Kenya?", "Africa"),
    ("geography", "Which ocean lies between Europe and North America?", "Atlantic"),
    ("geography", "Which country has the city of Osaka?", "Japan"),
    ("geography", "Which desert covers most of North Africa?", "Sahara"),
    ("language", "What is the plural of mouse, the animal?", "mice"),
    ("language", "Which word is the opposite of ancient: modern, narrow or brave?", "modern"),
    ("language", "Which letter comes after Q in the English alphabet?", "R"),
    ("language", "What is the past tense of go?", "went"),
    ("nature", "How many legs does a spider have?", "8"),
    ("nature", "Which gas do plants take from the air: oxygen or carbon dioxide?", "carbon dioxide"),
    ("nature", "At how many degrees Celsius does water boil at sea level?", "100"),
    ("nature", "Which planet is nearest to the sun?", "Mercury"),
]


def reviews() -> pa.Table:
    product, stars, language, text = zip(*REVIEWS, strict=True)
    return pa.table(
        {
            "review_id": pa.array(range(1, len(REVIEWS) + 1), pa.int64()),
            "product": pa.array(product).dictionary_encode(),
            "stars": pa.array(stars, pa.int8()),
            "language": pa.array(language),
            "text": pa.array(text),
        }
    )


def questions() -> pa.Table:
    topic, question, truth = zip(*QUESTIONS, strict=True)
    return pa.table({"topic": topic, "question": question, "truth": truth})


if __name__ == "__main__":
    pq.write_table(reviews(), HERE / "reviews.parquet", compression="zstd")
    pq.write_table(questions(), HERE / "questions.parquet", compression="zstd")
