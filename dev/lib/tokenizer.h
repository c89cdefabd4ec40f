// == Tokenizer ====================================================================================
// Text to token ids and back: plain bytes, or a tokenizer.json of Hugging Face with a byte-level BPE
// and the pattern of GPT-2 (GPT-2's, GPT-NeoX's, ours). Encoding is exact or refused.

typedef struct { const char *text; size_t size; int32_t id; int level; } AddedToken;
typedef struct { uint64_t pair; uint32_t rank; } MergeSlot;    // left id << 32 | right id
#define NO_MERGE UINT32_MAX

typedef struct Tokenizer {
    const char *path;            // for errors
    Bytes file;                  // tokenizer.json as it was read, to be copied into checkpoints
    int vocab, eot;              // largest id + 1; the end-of-text token, -1 without one
    int byte_level;              // the ids of bytes are their values, and nothing is merged
    int use_regex, nfc;          // words are split by the pattern; text is brought into normal form C
    Bytes *piece;                // (vocab) the bytes of each token; data is NULL where there is none
    size_t piece_room;
    char *pool;                  // where the next piece goes
    int32_t byte_id[256];        // -1: no token
    MergeSlot *slot;             // hash table: two tokens -> rank of their merge
    size_t slots;                // a power of 2
    int32_t *merged;             // by rank, 0 first: what the merge makes
    AddedToken *added;           // the longest first
    size_t n_added;
    char starts[2][256];         // whether an added token of this level starts with this byte
    char kind[0x1FB00];          // of each code point, by the table below
} Tokenizer;

// The first code points of runs that are L letters, N numbers, S white space or P anything else to
// the pattern of GPT-2; X: not known here, because unassigned, left out, or not stable in form C.
static const char KINDS[] =
    "0P 9S EP 20S 21P 30N 3AP 41L 5BP 61L 7BP 85S 86P A0S A1P AAL ABP B2N B4P B5L B6P B9N BAL BBP "
    "BCN BFP C0L D7P D8L F7P F8L 2C2P 2C6L 2D2P 2E0L 2E5P 2ECL 2EDP 2EEL 2EFP 300X 34FP 350X 370L "
    "374X 375P 376L 378X 37AL 37EX 37FL 380X 384P 386L 387X 388L 38BX 38CL 38DX 38EL 3A2X 3A3L "
    "3F6P 3F7L 482P 483X 488P 48AL 530X 5D0L 5EBX 60CP 610X 61BP 620L 64BX 660N 66AP 66EL 670X "
    "671L 6D4P 6D5L 6D6X 1E00L 1F00X 2002S 200BP 2028S 202AP 202FS 2030P 205FS 2060P 2065X 2066P "
    "2070N 2071L 2072X 2074N 207AP 207FL 2080N 208AP 208FX 2090L 209DX 20A0P 20D0X 20DDP 20E1X "
    "20E2P 20E5X 2100P 2102L 2103P 2107L 2108P 210AL 2114P 2115L 2116P 2119L 211EP 2124L 2125P "
    "2126X 2127P 2128L 2129P 212AX 212CL 212EP 212FL 213AP 213CL 2140P 2145L 214AP 214EL 214FP "
    "2150N 2183L 2185N 218AP 218CX 2190P 2329X 232BP 2460N 249CP 24EAN 2500P 2776N 2794P 2ADCX "
    "2ADDP 2C00X 2E80P 3000S 3001P 3005L 3007N 3008P 3021N 302AX 3030P 3031L 3036P 3038N 303BL "
    "303DP 3040X 3041L 3097X 309BP 309DL 30A0P 30A1L 30FBP 30FCL 3100X 3131L 318FX 3190P 3192N "
    "3196P 31A0X 31C0P 31E4X 31F0L 3200P 321FX 3220N 322AP 3248N 3250P 3251N 3260P 3280N 328AP "
    "32B1N 32C0P 3400L 4DB6X 4DC0P 4E00L 9FF0X AC00L D7A4X FE00P FE10X FE30P FE50X FEFFP FF00X "
    "FF01P FF10N FF1AP FF21L FF3BP FF41L FF5BP FF66L FFBFX FFC2L FFC8X FFCAL FFD0X FFD2L FFD8X "
    "FFDAL FFDDX FFE0P FFE7X FFE8P FFEFX FFF9P FFFEX 1F000P 1F100N 1F10DP 1FB00X";

static void expand_kinds(char *kind, size_t size) {
    char *letter, last = 'X';
    size_t c = 0;
    for (const char *entry = KINDS; *entry; entry = letter + 2) {
        size_t first = strtoul(entry, &letter, 16);
        memset(kind + c, last, first - c);
        c = first;
        last = *letter;
    }
    memset(kind + c, last, size - c);
}

// The array with room for element number count, what is new zeroed.
static void *grow(void *array, size_t count, size_t *room, size_t size) {
    if (count < *room)
        return array;
    size_t more = count + count / 2 + 64;
    void *larger = alloc(more, size);
    if (array)
        memcpy(larger, array, *room * size);
    free(array);
    *room = more;
    return larger;
}

// ---- loading ------------------------------------------------------------------------------------
// In the file a character stands for each byte: a printable one for itself, U+0100 to U+0143 for the
// others in order.

typedef struct { const Json *key; int32_t id; } Name;
typedef struct { Name *slot; size_t slots; } Names;    // hash table of the vocabulary

static uint32_t byte_char(uint32_t byte) {
    if (byte <= 0x20)
        return 0x100 + byte;
    if (byte >= 0x7F && byte <= 0xA0)
        return 0x121 + byte - 0x7F;
    return byte == 0xAD ? 0x143 : byte;
}

static int char_byte(uint32_t code)    // -1 when it stands for none
{
    uint32_t byte = code < 0x100 ? code : code <= 0x120 ? code - 0x100
                  : code <= 0x142 ? code - 0x121 + 0x7F : 0xAD;
    return byte_char(byte) == code ? (int)byte : -1;
}

static size_t hash_slots(const Json *parent)    // a power of 2, at least twice its children
{
    size_t n = 0, slots = 2;
    JSON_EACH(child, parent)
        n++;
    while (slots < 2 * n)
        slots *= 2;
    return slots;
}

// Where the name a followed by b is, or belongs.
static Name *find_name(const Names *names, const char *a, size_t na, const char *b, size_t nb) {
    uint64_t hash = 0xCBF29CE484222325u;    // FNV-1a
    for (size_t i = 0; i < na + nb; i++)
        hash = (hash ^ (unsigned char)(i < na ? a[i] : b[i - na])) * 0x100000001B3u;
    for (size_t i = (size_t)hash;; i++) {
        Name *name = &names->slot[i & (names->slots - 1)];
        const Json *key = name->key;
        if (!key || (key->size == na + nb && !memcmp(key->text, a, na)
                     && !memcmp(key->text + na, b, nb)))
            return name;
    }
}

static uint64_t token_pair(int32_t left, int32_t right) {
    return (uint64_t)left << 32 | (uint64_t)right;
}

// Where the merge of two tokens is, or belongs.
static MergeSlot *find_merge(const Tokenizer *t, uint64_t pair) {
    for (size_t i = (size_t)((pair * 0x9E3779B97F4A7C15u) >> 32);; i++) {
        MergeSlot *slot = &t->slot[i & (t->slots - 1)];
        if (slot->pair == pair || slot->rank == NO_MERGE)
            return slot;
    }
}

static Bytes *new_piece(Tokenizer *t, const Json *value)    // for the token of this id
{
    size_t id = json_size(value, t->path, "id");
    CHECK(id < 1u << 24, "%s: token id %zu; expected less than %u", t->path, id, 1u << 24);
    for (; id >= (size_t)t->vocab; t->vocab++)
        t->piece = (Bytes *)grow(t->piece, (size_t)t->vocab, &t->piece_room, sizeof *t->piece);
    CHECK(!t->piece[id].data, "%s: two tokens have the id %zu", t->path, id);
    t->piece[id].data = t->pool;
    return &t->piece[id];
}

static size_t load_vocab(Tokenizer *t, const Json *vocab, Names *names)    // the number of its names
{
    size_t n = 0;
    json_expect(vocab, JSON_OBJECT, t->path, "vocab");
    names->slots = hash_slots(vocab);
    names->slot = (Name *)alloc(names->slots, sizeof *names->slot);
    JSON_EACH(key, vocab) {
        Bytes *piece = new_piece(t, key + 1);
        const char *end = key->text + key->size;
        size_t length;
        for (const char *s = key->text; s < end; s += length) {
            uint32_t code = 0;
            length = utf8_decode(s, end, &code);
            int byte = char_byte(code);
            if (byte < 0) {    // a name that is meant as it is, as those of added tokens are
                memcpy(piece->data, key->text, piece->size = key->size);
                break;
            }
            piece->data[piece->size++] = (char)byte;
        }
        t->pool += piece->size;
        Name *name = find_name(names, key->text, key->size, "", 0);
        name->key = key;
        name->id = (int32_t)(piece - t->piece);
        n++;
    }
    for (uint32_t b = 0; b < 256; b++) {
        char text[4];
        Name *name = find_name(names, text, utf8_encode(text, byte_char(b)), "", 0);
        t->byte_id[b] = name->key ? name->id : -1;
    }
    return n;
}

static void load_merges(Tokenizer *t, const Json *merges, const Names *names)    // "a b" or ["a", "b"]
{
    uint32_t rank = 0;
    json_expect(merges, JSON_ARRAY, t->path, "merges");
    t->slots = hash_slots(merges);
    t->slot = (MergeSlot *)alloc(t->slots, sizeof *t->slot);
    for (size_t i = 0; i < t->slots; i++)
        t->slot[i].rank = NO_MERGE;
    t->merged = (int32_t *)alloc(t->slots, sizeof *t->merged);
    JSON_EACH(merge, merges) {
        const char *a = merge->text, *b;
        size_t na, nb;
        if (merge->kind == JSON_ARRAY && merge->span == 3) {
            a = json_expect(merge + 1, JSON_STRING, t->path, "merges")->text;
            b = json_expect(merge + 2, JSON_STRING, t->path, "merges")->text;
            na = merge[1].size;
            nb = merge[2].size;
        } else {
            b = strchr(json_expect(merge, JSON_STRING, t->path, "merges")->text, ' ');
            CHECK(b && !strchr(b + 1, ' '), "%s: merge %u is \"%s\"; expected two tokens", t->path,
                  rank, a);
            na = (size_t)(b++ - a);
            nb = merge->size - na - 1;
        }
        const Name *left = find_name(names, a, na, "", 0), *right = find_name(names, b, nb, "", 0);
        const Name *both = find_name(names, a, na, b, nb);
        CHECK(left->key && right->key && both->key, "%s: merge %u joins \"%.*s\" and \"%.*s\"; the "
              "vocabulary lacks one of them or the result", t->path, rank, (int)na, a, (int)nb, b);
        MergeSlot *slot = find_merge(t, token_pair(left->id, right->id));
        slot->pair = token_pair(left->id, right->id);
        slot->rank = rank;
        t->merged[rank++] = both->id;
    }
}

static int longer_first(const void *a, const void *b) {
    const AddedToken *x = (const AddedToken *)a, *y = (const AddedToken *)b;
    return x->size != y->size ? (x->size > y->size ? -1 : 1) : memcmp(x->text, y->text, x->size);
}

static void unsupported(const Tokenizer *t, const char *field, int is) {
    CHECK(!is, "%s: \"%s\" has a value that is not supported: expected a byte-level BPE as GPT-2 and "
          "GPT-NeoX have it; encode the text into a .bin shard with the library instead",
          t->path, field);
}

// Whatever is not known might change the encoding.
static void known_keys(const Tokenizer *t, const Json *object, const char *known) {
    JSON_EACH(key, object) {
        const char *k = known;
        while (strncmp(k, key->text, key->size) || (k[key->size] != ' ' && k[key->size])) {
            k += strcspn(k, " ");
            CHECK(*k++, "%s: the key \"%s\" is not known; known are %s", t->path, key->text, known);
        }
    }
}

// The first character that is not UTF-8, or of which the pattern or form C is not known here.
static const char *unknown_char(const Tokenizer *t, const char *s, const char *end, uint32_t *code) {
    size_t length;
    for (; s < end; s += length) {
        *code = 0xFFFD;
        length = utf8_decode(s, end, code);
        if (length == 0)
            break;
        if ((t->use_regex || t->nfc) && (*code >= sizeof t->kind || t->kind[*code] == 'X'))
            break;
    }
    return s;
}

// Tokens that are cut out of the text before anything else: at level 0 out of the text as it is, at
// level 1 out of what is left, in normal form.
static void load_added(Tokenizer *t, const Json *list, const Names *names, size_t next) {
    t->added = (AddedToken *)alloc(hash_slots(list), sizeof *t->added);
    JSON_EACH(token, list) {
        known_keys(t, token, "id content special normalized single_word lstrip rstrip");
        unsupported(t, "single_word", json_bool(token, t->path, "single_word", 0));
        unsupported(t, "lstrip", json_bool(token, t->path, "lstrip", 0));
        unsupported(t, "rstrip", json_bool(token, t->path, "rstrip", 0));
        const Json *text = json_expect(json_get(token, "content"), JSON_STRING, t->path, "content");
        const Json *value = json_get(token, "id");
        const Name *name = find_name(names, text->text, text->size, "", 0);
        size_t id = json_size(value, t->path, "id"), expected = name->key ? (size_t)name->id : next;
        CHECK(text->size && id == expected, "%s: the added token \"%s\" has the id %zu; expected %zu",
              t->path, text->text, id, expected);
        next = id >= next ? id + 1 : next;
        Bytes *piece = name->key ? &t->piece[id] : new_piece(t, value);
        piece->data = (char *)memcpy(t->pool, text->text, piece->size = text->size);
        t->pool += piece->size;
        AddedToken *added = &t->added[t->n_added++];
        added->text = piece->data;
        added->size = piece->size;
        added->id = (int32_t)id;
        added->level = json_bool(token, t->path, "normalized", 0);
        t->starts[added->level][(unsigned char)*piece->data] = 1;
        uint32_t code;
        const char *end = added->text + added->size;
        unsupported(t, "content", t->nfc && unknown_char(t, added->text, end, &code) < end);
    }
    qsort(t->added, t->n_added, sizeof *t->added, longer_first);
    for (size_t i = 1; i < t->n_added; i++)
        unsupported(t, "content", longer_first(&t->added[i - 1], &t->added[i]) == 0);
}

// Refuses whatever would make the encoding another one than that of encode_words().
static void load_settings(Tokenizer *t, const Json *root, const Json *model) {
    const char *path = t->path;
    known_keys(t, root, "version truncation padding added_tokens normalizer pre_tokenizer "
               "post_processor decoder model");
    known_keys(t, model, "type dropout unk_token continuing_subword_prefix end_of_word_suffix "
               "fuse_unk byte_fallback ignore_merges vocab merges");
    unsupported(t, "truncation", json_get(root, "truncation") != NULL);
    unsupported(t, "padding", json_get(root, "padding") != NULL);
    unsupported(t, "type", strcmp(json_string(model, path, "type", "BPE"), "BPE"));
    unsupported(t, "dropout", json_number(model, path, "dropout", 0) != 0);
    unsupported(t, "byte_fallback", json_bool(model, path, "byte_fallback", 0));
    unsupported(t, "ignore_merges", json_bool(model, path, "ignore_merges", 0));
    unsupported(t, "continuing_subword_prefix",
                *json_string(model, path, "continuing_subword_prefix", ""));
    unsupported(t, "end_of_word_suffix", *json_string(model, path, "end_of_word_suffix", ""));

    const Json *pre = json_expect(json_get(root, "pre_tokenizer"), JSON_OBJECT, path, "pre_tokenizer");
    known_keys(t, pre, "type add_prefix_space trim_offsets use_regex");
    unsupported(t, "pre_tokenizer", strcmp(json_string(pre, path, "type", ""), "ByteLevel"));
    unsupported(t, "add_prefix_space", json_bool(pre, path, "add_prefix_space", 1));
    t->use_regex = json_bool(pre, path, "use_regex", 1);

    const Json *normalizer = json_get(root, "normalizer");
    t->nfc = normalizer != NULL;
    unsupported(t, "normalizer", t->nfc && strcmp(json_string(normalizer, path, "type", ""), "NFC"));
    const Json *decoder = json_get(root, "decoder");
    unsupported(t, "decoder", strcmp(json_string(decoder, path, "type", ""), "ByteLevel"));

    // A template is fine that holds the text alone: "single": [{"Sequence": ...}].
    const Json *post = json_get(root, "post_processor"), *single = json_get(post, "single");
    int alone = single && single->kind == JSON_ARRAY && single->span == 1 + single[1].span
             && json_get(single + 1, "Sequence");
    unsupported(t, "post_processor",
                post && !alone && strcmp(json_string(post, path, "type", ""), "ByteLevel"));
}

static Tokenizer *tokenizer_parse(const char *path, Bytes file) {
    Tokenizer *t = (Tokenizer *)alloc(1, sizeof *t);
    Json *root = json_parse(path, file.data, file.size);
    const Json *model = json_expect(json_get(root, "model"), JSON_OBJECT, path, "model");
    const Json *added = json_get(root, "added_tokens");
    Names names;
    t->path = path;
    t->file = file;
    t->pool = (char *)alloc(file.size + 1, 1);    // room for all names: each is part of the file
    t->eot = -1;
    expand_kinds(t->kind, sizeof t->kind);
    load_settings(t, root, model);
    size_t named = load_vocab(t, json_get(model, "vocab"), &names);
    load_merges(t, json_get(model, "merges"), &names);
    if (added)
        load_added(t, added, &names, named);

    static const char *const ends[] = { "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>" };
    for (size_t e = 0; t->eot < 0 && e < sizeof ends / sizeof *ends; e++)
        for (size_t i = 0; i < t->n_added; i++)
            if (t->added[i].size == strlen(ends[e]) && !memcmp(t->added[i].text, ends[e], strlen(ends[e])))
                t->eot = t->added[i].id;
    int complete = 1;
    t->byte_level = !t->nfc && (json_get(model, "merges"))->span == 1;
    for (int b = 0; b < 256; b++) {
        t->byte_level &= t->byte_id[b] == b;
        complete &= t->byte_id[b] >= 0;
    }
    unsupported(t, "unk_token", !complete && json_get(model, "unk_token"));
    free(names.slot);
    json_free(root);
    return t;
}

static Tokenizer *tokenizer_load(const char *path) {
    return tokenizer_parse(path, read_file(path));
}

// ---- encoding -----------------------------------------------------------------------------------

typedef struct { int32_t id; uint32_t previous, next, rank; } Symbol;    // rank of its merge with next

typedef struct {
    const Tokenizer *t;
    int32_t *ids;                // (count) the result
    size_t count, room;
    Symbol *symbol;              // (symbol_room) the word that is being merged, a linked list
    uint64_t *heap;              // (heap_size) rank << 32 | position of merges, the least first
    size_t symbol_room, heap_size;
} Encoder;

static void put_id(Encoder *e, int32_t id) {
    e->ids = (int32_t *)grow(e->ids, e->count, &e->room, sizeof *e->ids);
    e->ids[e->count++] = id;
}

static void heap_push(Encoder *e, uint64_t x) {
    size_t i = e->heap_size++;
    for (; i > 0 && e->heap[(i - 1) / 2] > x; i = (i - 1) / 2)
        e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = x;
}

static uint64_t heap_pop(Encoder *e) {
    uint64_t top = e->heap[0], x = e->heap[--e->heap_size];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < e->heap_size) {
        child += child + 1 < e->heap_size && e->heap[child + 1] < e->heap[child];
        if (x <= e->heap[child])
            break;
        e->heap[i] = e->heap[child];
        i = child;
    }
    e->heap[i] = x;
    return top;
}

static void consider_merge(Encoder *e, uint32_t i, uint32_t n)    // of symbol i with the next one
{
    Symbol *left = &e->symbol[i];
    left->rank = NO_MERGE;
    if (left->next < n)
        left->rank = find_merge(e->t, token_pair(left->id, e->symbol[left->next].id))->rank;
    if (left->rank != NO_MERGE)
        heap_push(e, (uint64_t)left->rank << 32 | i);
}

// Byte-pair encoding: of all merges the one of least rank comes first, of equal ones the leftmost.
static void encode_word(Encoder *e, const char *word, size_t size) {
    const Tokenizer *t = e->t;
    CHECK(size < UINT32_MAX / 4, "%s: a word of %zu bytes; expected less than 1 GiB", t->path, size);
    uint32_t n = (uint32_t)size;
    if (n > e->symbol_room) {
        free(e->symbol);
        free(e->heap);
        e->symbol_room = 2 * size;
        e->symbol = (Symbol *)alloc(e->symbol_room, sizeof *e->symbol);
        e->heap = (uint64_t *)alloc(3 * e->symbol_room, sizeof *e->heap);    // a merge pops 1, pushes 2
    }
    for (uint32_t i = 0; i < n; i++) {
        unsigned char byte = (unsigned char)word[i];
        Symbol symbol = { t->byte_id[byte], i - 1, i + 1, NO_MERGE };
        CHECK(symbol.id >= 0, "%s: no token for the byte 0x%02X of the text", t->path, byte);
        e->symbol[i] = symbol;
    }
    for (uint32_t i = 0; i < n; i++)
        consider_merge(e, i, n);
    while (e->heap_size > 0) {
        uint64_t top = heap_pop(e);
        uint32_t rank = (uint32_t)(top >> 32), i = (uint32_t)top;
        Symbol *left = &e->symbol[i];
        if (left->rank != rank)
            continue;    // it or its neighbour has been merged in the meantime
        Symbol *right = &e->symbol[left->next];
        left->id = t->merged[rank];
        left->next = right->next;
        right->rank = NO_MERGE;
        if (left->next < n)
            e->symbol[left->next].previous = i;
        consider_merge(e, i, n);
        if (i > 0)
            consider_merge(e, left->previous, n);
    }
    for (uint32_t i = 0; i < n; i = e->symbol[i].next)
        put_id(e, e->symbol[i].id);
}

// The kind of the character at s, and its length.
static char kind_at(const Tokenizer *t, const char *s, const char *end, size_t *length) {
    uint32_t code = 0;
    *length = utf8_decode(s, end, &code);
    return t->kind[code];
}

// The end of the word at s by the pattern of GPT-2 (L letters, N numbers, \s white space):
//     's|'t|'re|'ve|'m|'ll|'d| ?L+| ?N+| ?[^\sLN]+|\s+(?!\S)|\s+
static const char *word_end(const Tokenizer *t, const char *s, const char *end) {
    static const char *const endings[] = { "'s", "'t", "'re", "'ve", "'m", "'ll", "'d" };
    for (size_t i = 0; *s == '\'' && i < sizeof endings / sizeof *endings; i++) {
        size_t n = strlen(endings[i]);
        if ((size_t)(end - s) >= n && !memcmp(s, endings[i], n))
            return s + n;
    }
    size_t length;
    const char *word = s, *last = s;
    if (*s == ' ' && s + 1 < end && kind_at(t, s + 1, end, &length) != 'S')
        word++;
    char kind = kind_at(t, word, end, &length);
    while (word < end && kind_at(t, word, end, &length) == kind) {
        last = word;
        word += length;
    }
    return kind == 'S' && word < end && last > s ? last : word;    // the last space goes with the next
}

static void encode_words(Encoder *e, const char *s, const char *end) {
    if (e->t->byte_level) {
        while (s < end)
            put_id(e, (unsigned char)*s++);
        return;
    }
    while (s < end) {
        const char *next = e->t->use_regex ? word_end(e->t, s, end) : end;
        encode_word(e, s, (size_t)(next - s));
        s = next;
    }
}

// Cuts out the added tokens of this level, the leftmost first and of those the longest.
static void encode_level(Encoder *e, const char *s, const char *end, int level) {
    if (level == 2) {
        encode_words(e, s, end);
        return;
    }
    const Tokenizer *t = e->t;
    for (const char *p = s; p < end; p++) {
        if (!t->starts[level][(unsigned char)*p])
            continue;
        for (size_t i = 0; i < t->n_added; i++) {
            const AddedToken *a = &t->added[i];
            if (a->level == level && a->size <= (size_t)(end - p) && !memcmp(p, a->text, a->size)) {
                encode_level(e, s, p, level + 1);
                put_id(e, a->id);
                s = p + a->size;
                p = s - 1;
                break;
            }
        }
    }
    encode_level(e, s, end, level + 1);
}

// The ids of a text, (count); free() them. path names the text in errors.
static int32_t *tokenizer_encode(const Tokenizer *t, const char *path, const char *text, size_t size,
                                 size_t *count) {
    Encoder e = { t, NULL, 0, 0, NULL, NULL, 0, 0 };
    const char *end = text + size;
    uint32_t code = 0;
    if (!t->byte_level) {
        const char *s = unknown_char(t, text, end, &code);
        CHECK(s == end, "%s: byte %zu: U+%04X is not UTF-8, or not known to this program's GPT-2 "
              "pattern; encode the text into a .bin shard with %s and the tokenizers library instead",
              path, (size_t)(s - text), code, t->path);
    }
    encode_level(&e, text, end, 0);
    free(e.symbol);
    free(e.heap);
    *count = e.count;
    return e.ids;
}

// ---- decoding -----------------------------------------------------------------------------------

static const char *tokenizer_piece(const Tokenizer *t, int id, size_t *size) {
    int known = id >= 0 && id < t->vocab;
    *size = known ? t->piece[id].size : 0;
    return known ? t->piece[id].data : NULL;
}

// ---- our own: bytes -----------------------------------------------------------------------------

static void put_byte_tokenizer(Text *json) {
    static const char *const byte_level = "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
        "\"trim_offsets\": true, \"use_regex\": false}";
    put(json, "{\n  \"version\": \"1.0\", \"truncation\": null, \"padding\": null,\n"
        "  \"added_tokens\": [{\"id\": 256, \"content\": \"<|endoftext|>\", \"single_word\": false, "
        "\"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": true}],\n"
        "  \"normalizer\": null,\n  \"pre_tokenizer\": %s,\n  \"post_processor\": null,\n"
        "  \"decoder\": %s,\n  \"model\": {\"type\": \"BPE\", \"dropout\": null, "
        "\"unk_token\": null, \"continuing_subword_prefix\": null, \"end_of_word_suffix\": null, "
        "\"fuse_unk\": false, \"byte_fallback\": false, \"ignore_merges\": false, \"merges\": [],\n"
        "    \"vocab\": {", byte_level, byte_level);
    for (uint32_t b = 0; b < 256; b++) {
        char name[4];
        put(json, b ? ", " : "");
        put_json_string(json, name, utf8_encode(name, byte_char(b)));
        put(json, ": %u", b);
    }
    put(json, "}}\n}\n");
}

// Without tokenizer.json: every byte of a text is a token, and nothing in it is end of text.
static Tokenizer *tokenizer_bytes(void) {
    Text json = { NULL, 0, 0 };
    put_byte_tokenizer(&json);
    Bytes file = { json.data, json.size };
    Tokenizer *t = tokenizer_parse("the byte tokenizer", file);
    t->n_added = 0;
    return t;
}

// tokenizer_config.json: without the class transformers might build another tokenizer by model_type.
static void put_tokenizer_config(Text *json, const Tokenizer *t) {
    static const char *const roles[] = { "bos_token", "eos_token", "unk_token", "pad_token" };
    put(json, "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n"
        "  \"clean_up_tokenization_spaces\": false,\n  \"model_max_length\": 1000000000");
    for (size_t i = 0; t->eot >= 0 && i < 4; i++) {
        put(json, ",\n  \"%s\": ", roles[i]);
        put_json_string(json, t->piece[t->eot].data, t->piece[t->eot].size);
    }
    put(json, "\n}\n");
}
