"""The words and sentences that order lines are made of. Data only."""

from __future__ import annotations

# Wrapped as lists to be read, not one word per line.
# fmt: off
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
TENS = (
    "_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)

# Name, hundredth, and the sign or short form before an amount.
CURRENCIES = {
    "EUR": ("euros", "cents", "€"), "USD": ("dollars", "cents", "$"), "GBP": ("pounds", "pence", "£"),
    "CHF": ("francs", "rappen", "Fr. "),
}

# Singular and plural; a qualifier may stand before either.
NOUNS = {
    "shelf": "shelves", "lamp": "lamps", "mug": "mugs", "chair": "chairs", "knife": "knives", "box": "boxes",
    "vase": "vases", "candle": "candles", "blanket": "blankets", "brush": "brushes", "basket": "baskets",
    "notebook": "notebooks", "pencil": "pencils", "plate": "plates", "bowl": "bowls", "teapot": "teapots",
    "rug": "rugs", "cushion": "cushions", "mirror": "mirrors", "clock": "clocks", "bucket": "buckets",
    "ladder": "ladders", "hammer": "hammers", "saw": "saws", "rope": "ropes", "tent": "tents",
    "torch": "torches", "umbrella": "umbrellas", "scarf": "scarves", "jacket": "jackets", "apron": "aprons",
    "towel": "towels", "bench": "benches", "stool": "stools", "desk": "desks", "drawer": "drawers",
    "hook": "hooks", "tray": "trays", "jar": "jars", "bottle": "bottles", "kettle": "kettles", "pan": "pans",
    "spoon": "spoons", "whisk": "whisks", "watering can": "watering cans", "flower pot": "flower pots",
    "picture frame": "picture frames", "bag of coffee": "bags of coffee", "box of tea": "boxes of tea",
    "sack of flour": "sacks of flour", "jar of honey": "jars of honey", "tin of paint": "tins of paint",
    "roll of tape": "rolls of tape", "pack of nails": "packs of nails", "bar of soap": "bars of soap",
    "pair of gloves": "pairs of gloves",
}
QUALIFIERS = (
    "red", "blue", "green", "yellow", "black", "white", "grey", "brown", "small", "large", "round", "square",
    "folding", "wooden", "oak", "pine", "steel", "copper", "brass", "glass", "ceramic", "bamboo", "cotton",
    "linen", "wool", "leather", "plain", "striped",
)

STREET_NAMES = (
    "Mill", "Station", "Church", "Orchard", "Harbour", "Castle", "Bridge", "Market", "Garden", "Park",
    "River", "Forest", "Hill", "Meadow", "Chapel", "School", "Abbey", "Tower", "Canal", "Quarry", "Brewery",
    "Linden", "Willow", "Maple", "Cedar", "Birch", "Rose", "Heather", "Juniper", "Laurel", "Falcon", "Heron",
    "Swallow", "Badger", "Otter", "Fox", "Kings", "Queens", "Bishop", "Weaver", "Mason", "Cooper", "Miller",
    "Fisher", "Saddler", "Potter", "Victoria", "Albert", "North", "South", "East", "West", "Upper", "Lower",
    "Windmill", "Lighthouse", "Foundry", "Granary", "Vineyard", "Spring",
)
STREET_TYPES = {
    "Street": ("Street", "St", "St.", "Str."),
    "Road": ("Road", "Rd", "Rd."),
    "Avenue": ("Avenue", "Ave", "Ave.", "Av."),
    "Lane": ("Lane", "Ln", "Ln."),
    "Drive": ("Drive", "Dr", "Dr."),
    "Court": ("Court", "Ct", "Ct."),
    "Square": ("Square", "Sq", "Sq."),
    "Place": ("Place", "Pl", "Pl."),
    "Terrace": ("Terrace", "Ter", "Terr."),
    "Boulevard": ("Boulevard", "Blvd", "Blvd."),
    "Close": ("Close", "Cl."),
    "Way": ("Way",),
}
# Towns are a head and a tail: too many to be learned by heart.
TOWN_HEADS = (
    "Alder", "Ash", "Ayles", "Bar", "Black", "Brom", "Cal", "Cran", "Dun", "Elm", "Fair", "Farn", "Glen",
    "Green", "Hart", "Hazel", "Holm", "Kel", "Kirk", "Lang", "Lin", "Long", "Mar", "Mel", "New", "Nor", "Oak",
    "Pen", "Rad", "Raven", "Red", "Ross", "Salt", "Sand", "Shel", "Stan", "Thorn", "Wal", "Wex", "Wood",
)
TOWN_TAILS = (
    "bridge", "burn", "by", "dale", "field", "ford", "ham", "haven", "hurst", "mouth", "port", "ton", "stead",
    "well", "wick", "worth",
)

ASKS = (
    "Please send {}", "I would like {}", "We need {}", "Could I get {}", "Can you put aside {}",
    "I'd like to order {}", "Put me down for {}", "We'll take {}", "One order please: {}", "My order is {}",
    "Kindly ship {}", "Need {}",
)
COSTS = (
    "at {}", "for {}", "priced {}", "({})", "at the price of {}", "as agreed for {}",
)
TIMES = (
    "by {}", "on {}", "no later than {}", "to arrive on {}", "delivery on {}", "needed for {}",
    "before the end of {}",
)
PLACES = (
    "to {}", "at {}", "delivered to {}", "for our place at {}", "shipping to {}", "address: {}",
)
COST_SENTENCES = (
    "The price should be {}.", "You quoted {}.", "The list says {}.", "We agreed on {}.",
)
TIME_SENTENCES = (
    "I need it on {}.", "Delivery date: {}.", "It should be here by {}.", "Please deliver on {}.",
)
PLACE_SENTENCES = (
    "Send it to {}.", "The address is {}.", "We are at {}.", "Deliver to {}.", "Ship to: {}.",
)
NO_TIME_SENTENCES = (
    "There is no hurry.", "Any day is fine.", "I do not have a date yet.",
)
NO_PLACE_SENTENCES = (
    "I will pick it up.", "I'll collect it myself.", "No delivery, we come by the shop.",
)

GREETINGS = (
    "Hi,", "Hello,", "Hello there,", "Dear team,", "Good morning,", "Good evening,", "Hey,", "Dear all,",
    "Hi again,", "Greetings,", "To the shop:", "Good day,", "Hello from a happy customer,", "Morning!",
    "Dear sales desk,",
)
CLOSINGS = (
    "Thanks!", "Thank you.", "Many thanks.", "Cheers.", "Kind regards.", "Best wishes.", "Thx.", "Bye!",
    "Regards, Ana.", "Yours, M. Brandt", "Thanks in advance.", "All the best, Priya", "Talk soon.",
    "Best, Tom", "Cheers, Lena",
)
# fmt: on
LONG_CLOSINGS = (
    "Many thanks in advance for your help with this, and have a very nice week.",
    "Thank you very much, and please let me know as soon as it is ready to go.",
    "That would be all for today, thanks a lot and warm greetings to the whole team.",
)
NOTES = (
    "Please ring the bell twice, the first ring is hard to hear.",
    "If nobody is in, leave it with the neighbour.",
    "It is a gift, so no invoice in the parcel please.",
    "Could you wrap it in plain paper?",
    "My customer number is {number}.",
    "My phone is {phone} if anything is unclear.",
    "You can reach me at {phone} after {hour} pm.",
    "Last time the parcel took {small} days, which was fine.",
    "We live on floor {small}, and the lift is broken again.",
    "The {other} I bought from you last year is still going strong.",
    "A friend told me about your shop and showed me her {other}.",
    "I had asked about the {other} before, but that one can wait.",
    "Please do not send the {other} again, I already have it.",
    "I grew up in {town}, so I know your old shop well.",
    "My sister in {town} will order from you as well.",
    "We have been customers for {small} years now.",
    "Our office is closed on Mondays.",
    "The driver should use the back gate because the front one sticks.",
    "Reference {number} on the label would help our bookkeeping.",
    "Please confirm by email.",
    "I will pay by bank transfer as usual.",
    "Payment by card on delivery, if that still works.",
    "I could not find the right button on your page, hence this message.",
    "Sorry for the many questions last week.",
    "The dog barks a lot but is perfectly harmless.",
    "I hope you all had a restful holiday.",
    "Do you still run the workshop on Saturdays?",
    "If the colour is a little different from the picture, I do not mind.",
    "Please check that nothing is scratched before it leaves.",
    "The last box arrived with a dented corner, though nothing inside was hurt.",
    "Let me know if anything is out of stock.",
    "I am happy to wait a little if that saves a trip.",
    "The code for the garage is on the note by the door.",
    "There are {small} of us here during the day, someone will open.",
    "We are repainting the kitchen and everything is in a mess at the moment.",
    "My wife thinks it is too much, but I know it will look great.",
    "The weather has been dreadful, so please pack it dry.",
    "I saw your stand at the fair and have been thinking about it ever since.",
    "A short message from the driver half an hour before would be lovely.",
    "We do not need the assembly service this time.",
    "Please keep the packaging small, our bin is always full.",
    "I know that you are busy, so take your time with the reply.",
    "Your colleague on the phone was very kind and patient with me.",
    "Should there be a discount for regulars, I would not say no.",
    "For the parking space, tell the guard it is for unit {small}.",
    "The old one finally gave up after a long and useful life.",
    "My invoice number {number} from last spring is settled, by the way.",
    "We counted again and this is really what we need.",
    "The children have already chosen a corner for it.",
    "This replaces my earlier message, which you can ignore.",
    "I would rather not have it left in the rain like in the spring.",
    "If you have a catalogue on paper, put one in.",
    "The house is the one with the green door behind the bakery.",
    "Nobody answers the phone at lunch time, so a message is better.",
)
