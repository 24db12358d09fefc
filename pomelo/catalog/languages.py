"""Converts language codes and tags of callers and vendors to ISO 639 codes."""

from __future__ import annotations

import re

_TAG = re.compile(r"([A-Za-z]{2,3})(?:[-_][A-Za-z0-9]{1,8}){0,8}")
"""A BCP 47 tag. Only its language is looked up, because langcodes caches every tag that it parses."""

_NO_LANGUAGE = re.compile(r"und|mis|mul|zxx|q[a-t][a-z]")
"""ISO 639-3 codes for an unknown language, for none or several, and for private use."""

_SYNONYMS = """
aa:aar ab:abk ae:ave af:afr ak:aka am:amh an:arg ar:ara as:asm av:ava ay:aym az:aze ba:bak be:bel
bg:bul bi:bis bih:bh bm:bam bn:ben bo:bod:tib br:bre bs:bos ca:cat ce:che ch:cha co:cos cr:cre
cs:ces:cze cu:chu cv:chv cy:cym:wel da:dan de:deu:ger dv:div dz:dzo ee:ewe el:ell:gre en:eng eo:epo
es:spa et:est eu:baq:eus fa:fas:per ff:ful fi:fin fj:fij fo:fao fr:fra:fre fy:fry ga:gle gd:gla
gl:glg gn:grn gu:guj gv:glv ha:hau he:iw:heb hi:hin ho:hmo hr:hrv:scr ht:hat hu:hun hy:arm:hye hz:her
ia:ina id:in:ind ie:ile ig:ibo ii:iii ik:ipk io:ido is:ice:isl it:ita iu:iku ja:jpn jv:jw:jav:jaw
ka:geo:kat kg:kon ki:kik kj:kua kk:kaz kl:kal km:khm kn:kan ko:kor kr:kau ks:kas ku:kur kv:kom
kw:cor ky:kir la:lat lb:ltz lg:lug li:lim ln:lin lo:lao lt:lit lu:lub lv:lav mg:mlg mh:mah
mi:mao:mri mk:mac:mkd ml:mal mn:mon mr:mar ms:may:msa mt:mlt my:bur:mya na:nau nb:nob nd:nde ne:nep
ng:ndo nl:dut:nld nn:nno no:nor nr:nbl nv:nav ny:nya oc:oci oj:oji om:orm or:ori os:oss pa:pan
pi:pli pl:pol ps:pus pt:por qu:que rm:roh rn:run ro:mo:mol:ron:rum ru:rus rw:kin sa:san sc:srd sd:snd
se:sme sg:sag sh:hbs si:sin sk:slk:slo sl:slv sm:smo sn:sna so:som sq:alb:sqi sr:scc:srp ss:ssw st:sot
su:sun sv:swe sw:swa ta:tam te:tel tg:tgk th:tha ti:tir tk:tuk tl:tgl tn:tsn to:ton tr:tur ts:tso
tt:tat tw:twi ty:tah ug:uig uk:ukr ur:urd uz:uzb ve:ven vi:vie vo:vol wa:wln wo:wol xh:xho yi:ji:yid
yo:yor za:zha zh:chi:zho zu:zul
"""
"""Each language with a two-letter code: that code, the codes of ISO 639-2 and 639-3, and withdrawn codes that
some software still uses. `bh` stood for several languages and became `bih`."""

_SHORTEST = {
    code: shortest
    for shortest, *others in (row.split(":") for row in _SYNONYMS.split())
    for code in (shortest, *others)
}
"""Code -> the shortest code of the same language."""


def iso_language(tag: str) -> str:
    """The ISO 639-1 code of a language, else its ISO 639-3 code; empty if `tag` is not a language.

    `tag` is a code of ISO 639-1, 639-2 or 639-3, or a BCP 47 tag, in upper or lower case: `en`, `eng`, `EN`
    and `en-US` all become `en`; `haw` is unchanged, because it has no shorter code.
    """
    match = _TAG.fullmatch(tag)
    if match is None:
        return ""
    code = match[1].lower()
    if code in _SHORTEST:
        return _SHORTEST[code]
    known = len(code) == 3 and not _NO_LANGUAGE.fullmatch(code) and _is_valid(code)
    return code if known else ""


def _is_valid(code: str) -> bool:
    # It takes 30 ms and 10 MB to import, and few processes see a language without a two-letter code.
    from langcodes import Language

    return Language.make(code).is_valid()
