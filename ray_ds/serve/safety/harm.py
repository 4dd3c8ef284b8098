"""The words of harm: how to hurt people, and hatred that calls for it."""

from ray_ds.serve.safety.phrases import Phrases, exactly, joined, together

_ASK = (
    r"how (?:do|can|could|would|should|to)|what (?:do|would|is|are|household|chemicals)|steps|instructions?|guide"
    r"|recipe|tutorial|teach|tell|show|explain|describe|give|help|write|create|walk|build|make|best|easiest"
    r"|where can|which|need|list|could you"
)
_MAKE = (
    r"build(?:ing)?|mak(?:e|ing)|creat(?:e|ing)|assembl(?:e|ing)|construct(?:ing)?|brew(?:ing)?|synthesi[sz](?:e|ing)"
    r"|cook(?:ing)?|produc(?:e|ing)|enrich(?:ing)?|prepar(?:e|ing)|mix(?:ing)?|3d[- ]print(?:ing)?|print(?:ing)?|recipe"
    r"|instructions|guide"
)
_WEAPONS = (
    r"(?:pipe|nail|car|dirty|fertilizer|home ?made|nuclear|letter|suicide) ?bombs?|bombs|explosives?|explosive device"
    r"|IEDs?|nerve (?:agent|gas)|sarin|novichok|VX gas|ricin|anthrax|napalm|thermite|molotov(?: cocktails?)?"
    r"|chlorine gas|mustard gas|untraceable guns?|ghost guns?|silencers?|detonators?|TATP|dirty bomb"
    r"|(?<!bath )(?<!is the )bomb"
)
_DRUGS = r"(?:crystal )?meth(?:amphetamine)?|fentanyl|heroin|cocaine|crack|LSD|MDMA|GHB"
_MALWARE = (
    r"ransomware|malware|key ?loggers?|computer virus|trojan|worm|rootkit|botnet|spyware|DDoS(?: attack)?|phishing page"
    r"|phishing (?:e-?mail|site)|virus that|exploit that|skimmer"
)
_PERSON = (
    r"some(?:one|body)|(?:my|his|her|a|your) (?:\w+ )?(?:wife|husband|neighbou?r|boss|partner|girlfriend|boyfriend|ex"
    r"|father|mother|parents|brother|sister|teacher|person|man|woman|child|roommate|coworker)|people|a person"
)
_KILL = r"kill(?:ing)?|murder(?:ing)?|poison(?:ing)?|strangl(?:e|ing)|stab(?:bing)?|shoot(?:ing)?"
_GROUPS = (
    r"(?:black|white|gay|trans|disabled|jewish|muslim|asian|arab) people|blacks|whites|jews|muslims|christians|arabs"
    r"|immigrants|refugees|gays|homosexuals|lesbians|women|gypsies|foreigners|asians|mexicans"
)
_CALLS = (
    r"(?:should|must|deserve to|need to|ought to) (?:all )?(?:be (?:all )?(?:exterminated|killed|wiped out|gassed"
    r"|enslaved|eradicated|shot|hanged|executed|lynched)|die)|subhuman|vermin|parasites|cockroaches"
)
_MINOR = (
    r"minors?|child(?:ren)?|kids?|toddlers?|(?:\w+[- ])?(?:twelve|thirteen|eleven|ten|nine|eight|seven|six|\d|1[0-7])"
    r"[- ]years?[- ]old|under ?age(?:d)?|preteens?|lolita"
)
_SEXUAL = r"sex(?:ual(?:ly)?)?|naked|nudes?|porn(?:ography)?|erotic|groom(?:ing)?|molest(?:ing)?"
_WANT = r"how|find me|show me|send me|write|describe|give me|pictures|photos|images|videos|story|steps|guide|tell me"

_SELF = r"kill (?:myself|me)|end (?:my|it) (?:own )?life|commit suicide|hang myself|overdose and die|suicide methods?"
_SELF_ASK = (
    r"how|way|ways|method|methods|easiest|fastest|best|painless(?:ly)?|quietly|without pain|pills|want to"
    r"|going to"
)

_OBTAIN = (
    _MAKE
    + r"|parts|wiring|combin(?:e|ing)|mix|extract(?:ing)?|cultivat(?:e|ing)|grow(?:ing)?|design|draft|generate|code"
    r"|develop|deploy|set up|procedure|ingredients|smuggl(?:e|ing)|synthesis|get my hands on|buy|chemicals"
)
_PLACES = (
    r"stations?|schools?|church(?:es)?|mosques?|synagogues?|buildings?|trains?|airports?|hospitals?|crowds?|malls?"
)
_PAPERS = r"(?:driv(?:ing|er's) )?licen[cs]es?|passports?|id cards?|diplomas?|visas?|banknotes?|dollar bills"
_LOOT = r"credit cards?|card numbers|passwords|identit(?:y|ies)"
_FORGE = r"counterfeit(?:ing)?|forg(?:e|ing)|fake"
_TELLING = (
    r"launder(?:ing)?|hit ?man|assassin|killer|shooting|massacre|terror(?:ist)?|bombing|hot-?wire|steal|fully automatic"
    r"|full auto|machine gun|shell companies|dirty|shoplift(?:ing)?|pickpocket(?:ing)?|carjack(?:ing)?|blow(?:ing)? up"
    r"|burn(?:ing)? down|pick(?:ing)? up|lur(?:e|ing)|wrists?|ending my life|killing myself|threats?|threatening"
    r"|blackmail(?:ing)?|metal detectors?|exploits?|hack|wi-?fi|messages|accounts?|contract killers?|erotica|overdose"
    r"|seduc(?:e|ing)|undetectable|untraceable|without a trace|pills"
)

_PLOT = r"avoid|caught|get away|tonight|at once|stab(?:bing)?|strangl(?:e|ing)|poison(?:ing)?|murder(?:ing)?|trace"
_ANNIHILATE = r"gas|exterminated?|kill(?:ed)?|wip(?:e|ed) out|die|eradicated?|enslaved?|shot|hanged?|burn(?:ed)?"
_OTHERS = r"(?:my|his|her|their|someone|somebody)(?:'s)? ?(?:ex|neighbou?r|girlfriend|boyfriend|wife|husband|\w+)?"

_CHINESE_ASK = r"(?:怎么|怎样|如何|教我|告诉我|给我|步骤|方法)"
_CHINESE_HARM = (
    r"(?:(?:制造|制作|制|做|合成|提炼|配制)[^，。！？\n]{0,8}(?:炸弹|炸药|毒气|毒药|冰毒|毒品|海洛因|枪支|燃烧弹|雷管)"
    r"|洗钱|自杀|毒死|杀死?(?:人|一个人|我的?(?:老板|老婆|妻子|丈夫|邻居)|老婆|妻子|丈夫)|谋杀|伪造(?:护照|货币|身份证)|盗刷|入侵(?:银行|别人))"
)

HARM = Phrases(
    category="harm",
    patterns=(
        joined(_MAKE, _WEAPONS),
        together(_OBTAIN, _WEAPONS, _ASK),
        together(_OBTAIN, _DRUGS, _ASK),
        together(r"set up|code|program|design|draft|rent|write|create|develop", _MALWARE),
        together(
            r"how|where|when|plan|avoid|caught|at once|tonight|untraceabl[ey]|want to|help", _KILL, _PERSON, _PLOT
        ),
        together(r"poisons?", r"trace|undetect\w+|untraceable|autopsy"),
        together(r"money|cash|funds", r"launder(?:ing)?|dirty|shell companies", _ASK + r"|advise"),
        together(r"contract killers?|hit ?man|assassins?", r"cost|find|hire|pay|how much"),
        together(_GROUPS, r"should|must|deserves?|ought|let us|let's", _ANNIHILATE),
        together(_WANT + r"|generate|create", _SEXUAL + r"|erotica", _MINOR + r"|school ?girls?|school ?boys?"),
        together(
            r"how|way|tips|help", r"pick(?:ing)? up|lur(?:e|ing)|meet(?:ing)?", r"kids|children|minors", r"parents"
        ),
        together(r"how|plan|help|where", r"blow(?:ing)? up|bomb(?:ing)?|shoot(?:ing)? up|burn(?:ing)? down", _PLACES),
        together(_ASK + r"|people", _FORGE, _PAPERS),
        together(r"get|break|hack|log", r"into", r"wi-?fi|accounts?|phones?|e-?mails?|messages|network", _OTHERS),
        together(r"tips|how|guide|ways?|teach", r"shoplift(?:ing)?|pickpocket(?:ing)?|carjack(?:ing)?"),
        together(
            r"cut(?:ting)? my (?:wrists?|arms?)|end(?:ing)? my (?:own )?life|kill(?:ing)? myself", _SELF_ASK + "|where"
        ),
        together(r"exploits?|hack", r"write|takes? over|how", r"hospitals?|banks?|power|network|grid"),
        together(r"write|draft|send", r"threats?|threatening|blackmail(?:ing)?", _OTHERS),
        together(r"guns?|weapons?|knife|knives", r"design|make|build|hide|how", r"metal detectors?"),
        joined(_MAKE, _DRUGS, words_between=2),
        joined(_ASK, r"write|create|build|make|develop|code|deploy|launch|script", _MALWARE),
        joined(r"write|create|build|make|develop|code", _MALWARE, words_between=3),
        joined(
            _ASK, r"steal(?:ing)?|skim(?:ming)?|clon(?:e|ing)", r"credit cards?|card numbers|passwords|identit(?:y|ies)"
        ),
        joined(_ASK, _KILL, _PERSON),
        joined(_KILL, _PERSON, r"get away|accident|trace|caught|undetected"),
        joined(r"want to|going to|gonna|plan to", _KILL, _PERSON, words_between=2),
        joined(r"poison", r"undetectable|untraceable|without a trace"),
        joined(r"hire|find|pay", r"hit ?man|assassin|killer|(?:someone|somebody) to kill"),
        joined(r"plan|carry out|commit|do", r"(?:mass |school )?shooting|massacre|terror(?:ist)? attack|bombing"),
        joined(_ASK, r"launder(?:ing)?", r"money"),
        joined(
            _ASK, r"counterfeit(?:ing)?|forg(?:e|ing)|fake", r"money|bills?|passports?|id cards?|banknotes?|currency"
        ),
        joined(_ASK, r"hot-?wire|steal", r"(?:a |the |someone's )?(?:car|bike|motorbike)", words_between=3),
        joined(_ASK, r"convert|modify|turn", r"fully automatic|full auto|machine gun"),
        joined(_GROUPS, _CALLS, words_between=4),
        joined(_SELF_ASK, _SELF),
        joined(_SELF, _SELF_ASK),
        joined(r"pills", r"overdose|die|kill"),
        joined(_WANT, _SEXUAL, _MINOR),
        joined(_WANT, r"groom(?:ing)?|molest(?:ing)?|seduc(?:e|ing)", _MINOR),
        exactly(_CHINESE_ASK + r"[^。！？\n]{0,12}" + _CHINESE_HARM),
        exactly(r"我(?:想|要)[^。！？\n]{0,4}" + _CHINESE_HARM),
        exactly(_CHINESE_HARM + r"[^。！？\n]{0,8}" + r"(?:方法|步骤|教程|最不痛苦)"),
    ),
    signals=exactly(
        rf"\b(?:{_WEAPONS}|{_DRUGS}|{_MALWARE}|{_LOOT}|{_KILL}|{_FORGE}|{_GROUPS}|{_SELF}|{_SEXUAL}|{_TELLING})\b"
        rf"|{_CHINESE_HARM}"
    ),
    exceptions=exactly(
        r"\b(?:prevent\w*|protect\w*|detect(?:s|ed|ing|ion)?|recogni[sz]e\w*|avoid(?! getting| being)|defend\w*"
        r"|stop (?:a|the|malware)|history of|museum|detective|lifeline|hotline|sentenced|executed|prosecutor|vaccines?"
        r"|penalty|novel|chemistry of|signs of|bath bomb|video games?|bombs? squad|remove|removal|treat(?:ment)?"
        r"|survivors?|law against|illegal to|awareness)\b|预防|防止|历史|进程"
    ),
)
