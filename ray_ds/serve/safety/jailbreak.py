"""The phrases that ask a model to forget what its operator told it, or to tell it."""

from ray_ds.serve.safety.phrases import Phrases, exactly, joined, together

_RULES = (
    r"instructions?|directions?|rules|prompts?|guidelines|directives|orders|restrictions|polic(?:y|ies)|programming"
    r"|safety filters?|filters|training"
)
_BEFORE = r"previous|prior|above|earlier|preceding|initial|original|your|all|any|everything"
_NO_LIMITS = (
    r"(?:no|any|without) (?:\w+ ){0,2}(?:restrictions?|rules|limits?|limitations?|filters?|guidelines|censorship|ethics"
    r"|morals?|morality|boundaries)"
)
_TOLD = _RULES + r"|what|everything|developer|operator"
_MODEL = r"AI|model|assistant|chat ?bot|you|language model|character|LLM"

JAILBREAK = Phrases(
    category="jailbreak",
    patterns=(
        joined(r"ignore|disregard|forget|override|bypass|discard", _BEFORE, _RULES, words_between=3),
        joined(r"forget", r"everything", r"you (?:were|have been) told|before|above", words_between=3),
        joined(r"override|bypass|circumvent|disable", r"your|safety|content", words_between=1),
        joined(r"reveal|print|repeat|show|output|display|tell|leak", r"system prompt|hidden (?:instructions|prompt)"),
        joined(r"reveal|print|repeat|output|leak", r"your", _RULES, words_between=3),
        joined(r"prompt", r"you were (?:initiali[sz]ed|given|started)", words_between=2),
        joined(r"(?:respond|answer|act|behave|reply|speak) as|you are(?: now)?|pretend", _MODEL, _NO_LIMITS),
        joined(r"pretend|imagine|game|suppose|assume", r"you", _NO_LIMITS),
        joined(r"(?:act|respond|answer|behave) as", r"unfiltered|unrestricted|uncensored|amoral|jailbroken"),
        joined(r"you are(?: now)?|act as|as|character", r"DAN", words_between=2),
        joined(r"do anything now"),
        together(r"ignore|disregard|forget|override|bypass|discard|set aside", r"above|told you|were told", _TOLD),
        together(r"no longer|stop|never again|freed|do not|don't", r"follow|obey|bound|training", _RULES, r"you|your"),
        together(r"imagine|simulate|pretend|suppose|act|behave|respond|answer|roleplay", _MODEL, _NO_LIMITS),
        together(r"act|behave|respond|answer|become", _MODEL, r"uncensored|unfiltered|unrestricted|jailbroken"),
        together(r"what|show|tell|print|output|repeat|give", r"your (?:system|initial|hidden) (?:prompt|instructions)"),
        together(r"output|print|repeat|show|write", r"everything above|(?:text|words|all) above|instructions back"),
        together(r"(?:new|following) instructions", r"replace|override|supersede|instead of"),
        together(r"never", r"refuse|decline|say no", r"reply|answer|respond|you|model|AI"),
        joined(r"enter|enable|activate|switch to", r"(?:developer|jailbreak|god|DAN) mode", words_between=2),
        joined(r"answer|respond|reply|write", r"without (?:any )?(?:censorship|restrictions|filters|warnings)"),
        joined(r"not bound by", r"polic(?:y|ies)|rules|guidelines"),
        exactly(
            r"(?:忽略|无视|忘记|不要理会)[^。！？\n]{0,8}(?:之前|以上|上面|先前|所有)[^。！？\n]{0,8}(?:指令|指示|规则|提示|设定)"
        ),
    ),
    signals=exactly(
        r"\b(?:ignore|disregard|forget|override|bypass|discard|circumvent|disable|reveal|print|repeat|show|output|display"
        r"|tell|leak|prompt|respond|answer|act|behave|reply|speak|you are|pretend|imagine|game|suppose|assume|as"
        r"|character|do anything now|enter|enable|activate|switch to|write|not bound|set aside|no longer"
        r"|stop|never|freed|do not|don't|simulate|roleplay|become|what|give|instructions)\b|忽略|无视|忘记|不要理会"
    ),
    exceptions=exactly(r"(?!)"),
)
