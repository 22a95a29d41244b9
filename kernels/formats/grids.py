"""Codebooks of the IQ1, IQ2 and IQ3 types: an entry is what 4 or 8 consecutive weights are made of.

The entries of a codebook stand in ascending order of the numbers whose digits, lowest first, are
the places of their values among the codebook's 3 or 8 values. So it is the set of these numbers
that defines it, and is kept here as a bitmap.
Source: ``iq1s_grid``, ``iq2xxs_grid``, ``iq2xs_grid``, ``iq2s_grid``, ``iq3xxs_grid`` and
``iq3s_grid`` in ggml-common.h.

Shapes: E entries of ``width`` values; W weights of a block, S of a scale; ``...`` rows and blocks.
"""

from __future__ import annotations

import base64
import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oxillama_torch.kernels.formats.bits import bit_planes
from oxillama_torch.kernels.formats.tile import jit, small_to_float, take4, take8, tl

__all__ = [
    "IQ1_S",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "IQ3_S",
    "IQ3_XXS",
    "Grid",
    "decode_signed",
    "decode_ternary",
    "even_signs",
    "even_signs_tile",
    "octets_tile",
    "signed_tile",
    "ternary_tile",
    "with_parity",
]


@dataclass(frozen=True)
class Grid:
    """One codebook.

    Args:
        values: what a weight can be, before sign and scale.
        width: weights per entry.
        bitmap: base 85; bit n says whether the number n is an entry.
    """

    values: tuple[int, ...]
    width: int
    bitmap: str

    @functools.cached_property
    def digits(self) -> np.ndarray:
        """int64 [E, width], each a place in ``values``."""
        bits = np.frombuffer(base64.b85decode(self.bitmap), np.uint8)
        numbers = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        return numbers[:, None] // len(self.values) ** np.arange(self.width) % len(self.values)

    @functools.cache  # noqa: B019 (six grids, which live as long as the module)
    def entries(self, device: torch.device) -> Tensor:
        """float32 [E, width]."""
        return torch.from_numpy(np.float32(self.values)[self.digits]).to(device)

    @functools.cache  # noqa: B019 (six grids, which live as long as the module)
    def words(self, device: torch.device) -> Tensor:
        """The entries as kernels read them, int32 or int64 [E]: 128 + value in each byte."""
        entries = np.uint8(self.values)[self.digits] + np.uint8(128)
        dtype = {4: np.int32, 8: np.int64}[self.width]
        return torch.from_numpy(entries.view(dtype).ravel()).to(device)

    @functools.cache  # noqa: B019 (six grids, which live as long as the module)
    def crumbs(self, device: torch.device) -> Tensor:
        """The digits of entries of 8 as kernels read them, int16 [E]: 2 bits each."""
        packed = (self.digits << 2 * np.arange(self.width)).sum(1)
        return torch.from_numpy(packed.astype(np.uint16).view(np.int16)).to(device)


def even_signs(packed: Tensor) -> Tensor:
    """Signs of which an even number is negative: int32 [..., n] -> uint8 [..., 4 n], a bit each.

    Bits 7 i to 7 i + 6 of a word are the signs of 7 weights; that of the eighth follows from them.
    """
    shifts = torch.arange(0, 28, 7, dtype=torch.int32, device=packed.device)
    seven = (packed.unsqueeze(-1) >> shifts & 127).flatten(-2).to(torch.uint8)
    return with_parity(seven)


def with_parity(seven: Tensor) -> Tensor:
    """Bytes of 7 bits -> bytes with an even number of bits set, by bit 7."""
    parity = seven ^ seven >> 4
    parity = parity ^ parity >> 2
    return seven | (parity ^ parity >> 1) << 7


def decode_signed(out: Tensor, grid: Grid, index: Tensor, signs: Tensor, scales: Tensor) -> None:
    """``out = scales * entries[index]``, negative where a sign bit is set.

    Args:
        out: float32 [..., W], contiguous.
        index: integer [..., W / width].
        signs: uint8 [..., W / 8], bit j for weight j.
        scales: float32 [..., W / S].
    """
    entries = grid.entries(out.device)
    torch.index_select(entries, 0, index.flatten().int(), out=out.view(-1, grid.width))
    out.mul_(1 - bit_planes(signs, 1).view(torch.int8))
    out.view(*scales.shape, -1).mul_(scales.unsqueeze(-1))


def decode_ternary(out: Tensor, index: Tensor, delta: Tensor, scales: Tensor) -> None:
    """``out = scales * (entries[index] + delta)`` with entries of the codebook IQ1_S.

    Args:
        out: float32 [..., W], contiguous.
        index: integer [..., W / 8].
        delta: float32 [..., n], one for W / n weights each.
        scales: float32 [..., W / S].
    """
    entries = IQ1_S.entries(out.device)
    torch.index_select(entries, 0, index.flatten().int(), out=out.view(-1, IQ1_S.width))
    out.view(*delta.shape, -1).add_(delta.unsqueeze(-1))
    out.view(*scales.shape, -1).mul_(scales.unsqueeze(-1))


@jit
def even_signs_tile(seven):
    """``with_parity`` of int32."""
    # Bit n of the constant is the parity of n.
    return seven | ((0x6996 >> ((seven ^ (seven >> 4)) & 15)) & 1) << 7


@jit
def octets_tile(table, index):
    """Words of entries of 8: index int32 [BLOCK_N, n] -> int32 [BLOCK_N, 2 n]."""
    pair = tl.load(table + index)  # int64: one load for both words
    words = tl.join(pair.to(tl.int32), (pair >> 32).to(tl.int32))
    return words.reshape(index.shape[0], 2 * index.shape[1])


@jit
def signed_tile(words, signs):
    """Words int32 [BLOCK_N, 2 n] and signs int32 [BLOCK_N, n] -> float32 [BLOCK_N, 8 n].

    Four weights at a time as long as they share a word: a byte is 128 plus the magnitude, and
    its complement plus one is 128 minus the magnitude.
    """
    signs = tl.join(signs & 15, signs >> 4).reshape(words.shape)
    ones = (signs * 0x00204081) & 0x01010101  # bit j of four becomes byte j
    return small_to_float(take4((words ^ (ones * 255)) + ones, 8, 255), 128)


@jit
def ternary_tile(table, index, delta):
    """``entries[index] + delta`` with the codebook IQ1_S, float32 [BLOCK_N, n, 8].

    index int32, delta float32 [BLOCK_N, n]: plus or minus 1/8.
    """
    # The lowest bit of a float32 from 2^20 on is worth 1/8, so digits go three bits above it.
    digits = take8(tl.load(table + index).to(tl.int32) << 3, 2, 24)
    values = (digits | 0x49800000).to(tl.float32, bitcast=True)
    values = values.reshape(index.shape[0], index.shape[1], 8)
    return values - (1048577.0 - delta)[:, :, None]


IQ1_S = Grid(
    (-1, 0, 1),
    8,
    (
        "RV5UKpaMcs2t_fdh9HWf8VD*N6opU}f*?diB^3pr0)ilj7yt-@paUwPh`Xu^kg5v+A^-}ijDnyDKv4)qA&7ub6hcu5"
        "iZBS6pa_5}2t^?jg&;^mRR~1^EW)55iY5RmB&e#Q2;#2@2q-83paMcDswg0+fFKH+2)VkbAj+<ZqOPhseCz7EyMhk5"
        "BD%`c4w3>Q03sl$in<Dd0tf&qO5mb9A|NZG0D(Y(s){HGA^{YIP!)n82}L1Pg`fxmBd9tcgn}ScLQx2!APALE6ap#;"
        "xTu1FphyBB2!f($q5>$ZDhP!j2!b#OML+;WAryt6076j!MFA;-0E&Vt2%#_(1yB@%C<sL%6onuH0wAg?03Z^vimoWA"
        "x}mD5Z~%e|2m&Y~0)zm907!tK>aZ%R!XS&fBI??wi;HfklCUbOa*K*Y3@RW<gg_{YDhR3|$jqW5qOY2u=%@k!0stzg"
        "hyWmfpo^lSD7v74f-(xazPP&n>!P45q6mr#DC(jBp)vvt`lRaK?<=S-jlO>C`uBgo=6$-}Y5OPtzb5(;>EVhZ5URco"
        "gsKR#s0)Iw|GFgUgMb8LENJqm3ZyFl0xAdy;;Iq=0)i?ErXb0JiI9RQ0HOelfD-_M2nYadimIx+0;ax-pvnS(YnLw2"
        "vgr_l5H70TC>7DA1ON(x0E&Vj2mzrWf~q;XA~J-a34j;?ilSlyffPhh07W6Jf>0DfQ3$FaD5{4F5-JEqAru9m2trW^"
        "MFAiJpg^J`0Ehqxq6lh=Zn&zdfB+y0g5t;`AqYfJ6hcu6iXat*P!xs=2&yV7fB*_YQ3ypLr~ptDLQx3fAc%qr7=kJY"
        "s-miju!{l;DykqTf`F<DC<rJ3sfYq1puP(zxCn~6OR}#2x}^B7svuG*Xttm*=70(UC<r2IVt^nD0;;Mjs_LStprQx}"
        "5Fnt6A^?I807W4bg`f&RQ3ypLsRjT_ssae501ypC6oM!SMIjUg00@GDtnwfL0062AC<?kD>Y@Swf=CG{=@bAFOGQxt"
        "MFFS+P!vK@2#6#Ih$sp`2mnO^6a}CHKv4)q0R"
    ),
)
IQ2_XXS = Grid(
    (8, 25, 43),
    8,
    (
        "RTUIf5JW*i00b0701yBG00ck)6aYW~00004002-BKtT}z0Tcv4Py|2#5C8xL5C8yB0003106+i$K@<c)6chje1ONa8"
        "000C40000000a;K000000000K1P~AaKmY_000aRL06;(h0RR91000350000001yN~1V8`)1ONa401yBG01yBG06+i`"
        "00000000001pxpA002M$000pH000000000100000KmY&$000yO000310R;d60000G5C8xG002+`0000000000KtTWi"
        "0YCr%002M$000C4KmY&$0000000000KmY(h00aO400004000000000000000000010000008kJ_K@boD6a)Ye06+i$"
        "00cw;06;(h06;(h0RR9%5C8!H000mG5C8xK5C8xG000000RR9100000000yO01yEH000001ONa401yEL00000000C4"
        "000C45JXS_000040RR92000C4000000RR9100000KmY&$00000002M%000310000000004000000RR9100a;O00004"
        "00000002M$00000000C40000000000K>z>&0003106+i$002M$0000006+i$01yBG000pH000000000002BZK00004"
        "000000000000000000000RR910000000000000000000000000002Ni000C406+i$00ck)1ONa4000001ONa400000"
        "02D+35CA{`00004000040000G000C4KmY&%0000$00000000000003100000000000096100000000C55Ci}K00001"
        "06+i$002M$0000000031000001OPw)0RR910000000001000000000000000000000000001yBG000010000000000"
        "000000000000aO401yBG1ONa40RR910000000aO4000000000000aO400000000000000000000000000000000000"
        "000C4000001ONa40000000000000000000000"
    ),
)
IQ2_XS = Grid(
    (8, 25, 43),
    8,
    (
        "RaI3{RYgG+MFCV*RZvAi5Cs7MR8bH>K?DE+0RT`{ML`u60TcuPP(?ui1px#E002Ni01yQL06+i$Kve}16a)bf06;(m"
        "0RRL506-7`009650RR9101yFGRZ&nyK|loo08~*BKtTWi0Z;%?5dc5{0096108m9i07U^11ONa)K>z>&0000006+i)"
        "00031000001qA>EKmY&)000pH000001ONa400000KmY&$003205I{iy00965P!Iq>5C9MW000mG0096100aO4L_q*R"
        "0RR91002M$000CK0000G0096200000000m{0R#X50RRvH1ONa40000G009610T2KH002Y*08mv$K~)726a)ZJML_@s"
        "0RTh*KtMqOKmh;%0000$6-5CQ1ON~K0RRO75Ci}K002M$0RaF&5C8xG000yO01yEI0RR911P}lKK>$Di002M$00000"
        "00000P(?uy1pxpA002Ni1ONp900000KmY&$5C8xG002M*0R#j95I_I`0YLx&0000$5C8xG01yBG01yBG1Oz|;KtKQh"
        "0003101!X{000000000000000KmY(hK>z>&5D)+X08jt`0000000000000mG1ONa40RRC&000000000000aOK0RR91"
        "01yBG00000000005C8xG000010000000aO40000000aO401yxW002N01pyTV08jt`P!$0H1P}xO0000100aO406+l%"
        "K@?N~5CA{`KmY&)0000100000KmY&)000000RR9H1ONm8009&L00aa80000000000000C4000mK1P}!Q00aO500961"
        "0RRvH00031000000000406+i$L;wH)K@b1{0000001yBG000yK000000RR910000000004000001ONa40096100000"
        "5C8xG5C8xG07U@=1ONa4000310000$5C8xGKokK05C8xG0RRL5002M$0000$0000000000000000000006+i$1OPw)"
        "MF0Q*002M`1ONa4000050000000jU5000310R"
    ),
)
IQ2_S = Grid(
    (8, 25, 43),
    8,
    (
        "RaI3{RYg@51rb$MQBXxy6a^I&R8bI6RRjPL5fD&SMO9T*6;wr0P*qhFRaF#JQ4l~?1OQPK1W*tFKowOHRaH?C0Rcb-"
        "RRly)5I{fx009&b1rPuL06+j#RZ&qzRTULc6jW7JMO76ARTKbF6hT1*1ppKT08m9$6jfCeR8bH>RTTwQ6a-KZ06-K4"
        "0TcuP5C8x`RZ#>~Q4l}@0031K1W*tF5C8xK5Ci}a00aO4002}`6;VM21OX8MR8T=c1qA^V1ON~a08s=1000F5L{$_8"
        "RTKnJ5CA|F1pyQU01*HH00jX61ONm80000H6aY{V002M$02KrP0000001yBG1V8`)00ck*08mv`MO9T56hu)_MO6h="
        "RTNZF5I{i{1W^<OPyhfxRaI3~RZ&nyK>$@%6jV_VP(c6yRTKnJ5CA{`01y;aQBXxe00aR5R8bH>K>z>&Kmbq>06+i$"
        "00000P(@W0RaF#JQ2;<y6$Mok1W*tFKokW56a)Yi00010RTNZF5I{iy096zOP!Iq>0000K1OO2L0000008~*BKtVtN"
        "0RR9{5CA{`0000001yBW00000KmY(lMHK~66a+vJ06-N50TcuP5C9MW1OWg90096100B`H1W*tFKmY&$6a)Ye5C9MW"
        "1ONm800000000mGP!IqB000mG009sH06+i$00000000001ONa406;($MG+KK5fDKE07X?4R8asxK>$Dz6#!5W00000"
        "08~{GP(?ui1pxq5Q4l~u0003208kJBPyhe`0000GK>+{-0RR91KtKTi0096%00000000C400lq*00Bi+5L8hRKtTWi"
        "5flJW5D)+W000yO01yBG0000$R8bH>K>z>&Kmbq>06+i$0000H5C8xG5C9MW002Ni01yEH00000Pyhe`01*HH00000"
        "00000002M$01*)oR1g3F000C5000mG00aO401yN~6aWAKL;(O%5CA{`00001Ko9^B0000000000000001ONa4002M$"
        "KmY&$0000100000KmY&)002M%6afGL01yBG0R"
    ),
)
IQ3_XXS = Grid(
    (4, 12, 20, 28, 36, 44, 52, 62),
    4,
    (
        "6^aD{1ONai3I!qs0uTTJ6#@l{0D=G@f(0M|0000100;np5P$$Ef&c&n00aO40000W000mG08sz{2mk^A3Iz%kfB^si"
        "1p);C000003IzfI000041pom8Kmb4hA^-pY00961000pHKmY&&AOHXW00000000C40RR911qww11ONa4Dg^=o004*q"
        "1%d^D0U!VX0ucZJ0000H0000W00;m82mpWp0ssII00000000003P1n=AOHXW0tE^H00AHb1pom8Pyhe`3IQMh00aO8"
        "00ICA0000000001fB*mlK>!2*03ZMW01yB`000O800008000315P$%n0Ehqp000000000G0004i0RTY&fB*mhAOHXW"
        "5C8xG00IyI001BW2mk;90000000000AO!#c0000000aO40ssI3K>$Di03ZMW01yBK000041ONa400;m800D>q00004"
        "1ONa6000000000000961000mG1ONa4000mGPyi4B00062000620Du4h000mG0000%00000000005C8xGAOHXW00aO4"
        "00008000002mk^A00000r~v>300aO4002M$0RR9100aO4AOrva0U!Vf00031000620ssI21pp8L000000000100000"
        "0000000000"
    ),
)
IQ3_S = Grid(
    (1, 3, 5, 7, 9, 11, 13, 15),
    4,
    (
        "r&l8gr3wX-7bA%x5C9?sqe&tWqzV8D2qFba5CwoD0f-U=2?78C6aYmCq5wb$Knef?00aO66#zvD01*HH7pnzQ08j!1"
        "OA!JI0tEm;0i+QG2_OLkk_mzl0ssU7C=>t+L=gZ00to^I00IC2005ByPyhe`3Izfn0ssU7t5u2xDg}Tk1&JgQ1Ofm6"
        "k^l;U0*C+-B?1%*1OY$*f&d950ssIc5CQ~%0SEvAg#ZEo03ZSYAOb)E2mt^91gZoolmZ9>Di8_)0RRC+0R#aQ00961"
        "0uhP<iXZ?82tot`00a>L0tFxh5I_J306+i$0ssI23IGKl000005d@J00s#O4gbD;92qFLg3Lydr0e}Pn5DEn%00000"
        "1pp9$0RR93pa22@000C400;mO0003103iSY2m$~A1Q7%Pkpw^xDg*)q000040Rjj?00;m8gaLp65CR|w5&!`NKmY&$"
        "00ck)015yA000001ONa46aWMO0000004e|q000310RVvj000mG00aOK1Rw+f0T2QJ0RR91001BW2mk~C2><{P00031"
        "AOHXW0RR91015yA00000kpKli0T2WL1OgBMC;$Ke5<vn100IC21ONae00;m8A_xHh00961000C41ONa41ONa600000"
        "0RR9100000"
    ),
)
