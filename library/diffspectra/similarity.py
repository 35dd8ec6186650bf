"""How alike two molecules are: fingerprints, fragments, functional groups."""

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rdkit.Chem import Mol

RADIUS, BITS = 2, 2048
FUNCTIONAL_GROUPS = {
    "alkane": "[CX4]",
    "alkene": "[CX3]=[CX3]",
    "alkyne": "[CX2]#C",
    "arene": "[$([cX3](:*):*),$([cX2+](:*):*)]",
    "alcohol": "[#6][OX2H]",
    "ether": "[OD2]([#6])[#6]",
    "aldehyde": "[CX3H1](=O)[#6]",
    "ketone": "[#6][CX3](=O)[#6]",
    "carboxylic acid": "[CX3](=O)[OX2H1]",
    "ester": "[#6][CX3](=O)[OX2H0][#6]",
    "haloalkane": "[#6][F,Cl,Br,I]",
    "acyl halide": "[CX3](=[OX1])[F,Cl,Br,I]",
    "amine": "[NX3;!$(NC=O)]",
    "amide": "[NX3][CX3](=[OX1])[#6]",
    "nitrile": "[NX1]#[CX2]",
    "sulfide": "[#16X2H0]",
    "thiol": "[#16X2H]",
}


class Similarity(NamedTuple):
    """Similarities from 0 to 1, those of the paper.

    morgan_tanimoto   |A & B| / |A | B| of Morgan fingerprints, radius 2, 2048 bits
    morgan_cosine     |A & B| / sqrt(|A| |B|) of the same
    maccs_tanimoto    of the MACCS keys
    fraggle           Fraggle similarity
    functional_group  Jaccard index of the sets of functional groups; 1 for two empty sets
    """

    morgan_tanimoto: float
    morgan_cosine: float
    maccs_tanimoto: float
    fraggle: float
    functional_group: float


def similarity(truth: "Mol", found: "Mol") -> Similarity:
    """All similarities of two molecules as their atoms are: hydrogens that are atoms take part, as in the paper."""
    from rdkit.Chem import MACCSkeys
    from rdkit.DataStructs import CosineSimilarity, TanimotoSimilarity

    morgan = [_morgan().GetFingerprint(mol) for mol in (truth, found)]
    maccs = [MACCSkeys.GenMACCSKeys(mol) for mol in (truth, found)]
    return Similarity(
        TanimotoSimilarity(*morgan),
        CosineSimilarity(*morgan),
        TanimotoSimilarity(*maccs),
        fraggle_similarity(truth, found),
        functional_group_similarity(truth, found),
    )


def fraggle_similarity(truth: "Mol", found: "Mol") -> float:
    """Fraggle similarity; 0 where RDKit cannot fragment or compare."""
    from rdkit import rdBase
    from rdkit.Chem.Fraggle import FraggleSim

    with rdBase.BlockLogs():
        try:
            return float(FraggleSim.GetFraggleSimilarity(truth, found)[0])
        except (ValueError, RuntimeError):  # a fragment breaks the rules of valence
            return 0.0


def functional_groups(mol: "Mol") -> dict[str, int]:
    """How often each functional group occurs; those that do not are left out."""
    counts = {name: len(mol.GetSubstructMatches(pattern)) for name, pattern in _patterns().items()}
    return {name: count for name, count in counts.items() if count}


def functional_group_similarity(truth: "Mol", found: "Mol") -> float:
    """Jaccard index of the sets of functional groups; 1 where neither has one."""
    first, second = functional_groups(truth).keys(), functional_groups(found).keys()
    return len(first & second) / len(first | second) if first | second else 1.0


def connectivity(mol: "Mol") -> str:
    """The first block of the InChIKey, fourteen letters: the constitution, with mobile hydrogens in any place."""
    return inchikey(mol)[:14]


def inchikey(mol: "Mol") -> str:
    """The whole InChIKey. Its stereo comes from the positions where the molecule has any."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        return Chem.MolToInchiKey(mol)


@cache
def _morgan() -> object:
    from rdkit.Chem import rdFingerprintGenerator

    return rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=BITS)


@cache
def _patterns() -> dict[str, "Mol"]:
    from rdkit import Chem

    return {name: Chem.MolFromSmarts(smarts) for name, smarts in FUNCTIONAL_GROUPS.items()}
