// == Tokenizer ====================================================================================
// Text to token ids and back: plain bytes, or a Hugging Face tokenizer.json with a byte-level BPE
// and the pattern of GPT-2 (GPT-2, GPT-NeoX, our own). Text is encoded exactly or refused.

typedef struct { Bytes text; int32_t id; int level; } AddedToken;
typedef struct { int32_t left, right; uint32_t rank; } Merge;

#define NO_MERGE UINT32_MAX
#define MAX_VOCAB (1 << 20)

typedef struct Tokenizer {
    const char *path;            // for errors
    Bytes file;                  // tokenizer.json as it was read, to be copied into checkpoints
    int vocab, eot;              // largest id + 1; the end-of-text token, or -1
    int byte_level;              // the ids of bytes are their values, and nothing is merged
    int use_regex, nfc;          // words are split by the pattern; text is taken in normal form C
    Bytes *piece;                // (MAX_VOCAB) the bytes of each token; NULL: no such id
    char *pool;                  // where the next piece goes
    int32_t byte_id[256];        // the token of each byte, or -1
    int32_t *merged;             // by rank, 0 is merged first: the token that results
    Merge *merge;                // (slots) hash table; rank is NO_MERGE where it is empty
    AddedToken *added;           // (n_added) the longest first
    size_t slots, n_added;
    char starts[2][256];         // whether an added token of this level starts with this byte
    char kind[0x1FB00];          // of each code point: a letter of KINDS
} Tokenizer;

// From each of these code points on, characters are L letters, N numbers, S white space, P others,
// or X not known here: unassigned, left out, or changed by normal form C.
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

// All that may be in a tokenizer.json, since anything else might encode differently. An entry that
// ends in = or . takes whatever follows.
static const char *const SUPPORTED[] = {
    "version=", "truncation=null", "padding=null", "normalizer=null", "normalizer.type='NFC'",
    "added_tokens=[]", "added_tokens.id=", "added_tokens.content=", "added_tokens.special=",
    "added_tokens.normalized=", "added_tokens.single_word=false", "added_tokens.lstrip=false",
    "added_tokens.rstrip=false", "pre_tokenizer.type='ByteLevel'", "pre_tokenizer.trim_offsets=",
    "pre_tokenizer.add_prefix_space=false", "pre_tokenizer.use_regex=", "model.type='BPE'",
    "model.dropout=null", "model.dropout=0.0", "model.unk_token=", "model.fuse_unk=",
    "model.byte_fallback=", "model.ignore_merges=false", "model.continuing_subword_prefix=null",
    "model.continuing_subword_prefix=''", "model.end_of_word_suffix=null",
    "model.end_of_word_suffix=''", "model.vocab.", "model.merges=", "decoder=null",
    "decoder.type='ByteLevel'", "decoder.add_prefix_space=", "decoder.trim_offsets=",
    "decoder.use_regex=", "post_processor=null", "post_processor.type='ByteLevel'",
    "post_processor.add_prefix_space=", "post_processor.trim_offsets=", "post_processor.use_regex=",
    "post_processor.type='TemplateProcessing'", "post_processor.single.Sequence.",
    "post_processor.pair.", "post_processor.special_tokens={}",
};

// ---- loading ------------------------------------------------------------------------------------

static void refuse_unsupported(const char *path, const Json *node, Text *where) {
    size_t size = where->size;
    JSON_EACH(child, node) {
        where->size = size;
        if (node->kind == JSON_OBJECT)
            put(where, size ? ".%s" : "%s", child->text);
        refuse_unsupported(path, node->kind == JSON_OBJECT ? child + 1 : child, where);
    }
    if (node->span > 1)
        return;
    if (node->kind < JSON_ARRAY)
        put(where, node->kind == JSON_STRING ? "='%.*s'" : "=%.*s", (int)node->size, node->text);
    else
        put(where, node->kind == JSON_ARRAY ? "=[]" : "={}");
    for (size_t i = 0; i < sizeof SUPPORTED / sizeof *SUPPORTED; i++) {
        size_t n = strlen(SUPPORTED[i]);
        int open = strchr("=.", SUPPORTED[i][n - 1]) != NULL;
        if (!strncmp(where->data, SUPPORTED[i], n) && (open || !where->data[n]))
            return;
    }
    die("%s: \"%.99s\" is not supported; encode the text elsewhere, to .bin shards", path,
        where->data);
}

// A vocabulary spells each byte as a character: the printable ones as themselves, the others, in
// order, as U+0100 to U+0143.
static uint32_t byte_char(uint32_t byte) {
    if (byte <= 0x20)
        return 0x100 + byte;
    if (byte >= 0x7F && byte <= 0xA0)
        return 0x121 + byte - 0x7F;
    return byte == 0xAD ? 0x143 : byte;
}

static int char_byte(uint32_t code)    // -1 where it spells none
{
    uint32_t byte = code < 0x100 ? code : code <= 0x120 ? code - 0x100
                  : code <= 0x142 ? code - 0x121 + 0x7F : 0xAD;
    return byte_char(byte) == code ? (int)byte : -1;
}

static size_t spelled_bytes(char *out, const Json *name) {
    size_t n = 0, length;
    for (const char *s = name->text; s < name->text + name->size; s += length) {
        uint32_t code = 0;
        length = utf8_decode(s, name->text + name->size, &code);
        int byte = char_byte(code);
        if (byte < 0) {    // not spelled: meant as it is written
            memcpy(out, name->text, name->size);
            return name->size;
        }
        out[n++] = (char)byte;
    }
    return n;
}

static Bytes *add_piece(Tokenizer *t, int32_t id) {
    CHECK(!t->piece[id].data, "%s: two tokens have the id %d", t->path, id);
    t->piece[id].data = t->pool;
    t->vocab = id < t->vocab ? t->vocab : id + 1;
    return &t->piece[id];
}

static int32_t token_id(const Tokenizer *t, const Json *value) {
    size_t id = json_size(value, t->path, "id");
    CHECK(id < MAX_VOCAB, "%s: the token id %zu; expected less than %d", t->path, id, MAX_VOCAB);
    return (int32_t)id;
}

typedef struct { const Json **keys; size_t count; } Names;    // of the vocabulary, sorted

static int32_t find_token(const Tokenizer *t, const Names *names, const char *text, size_t size) {
    Json name = { text, (uint32_t)size, JSON_STRING, 1 };
    const Json *key = &name;
    const Json **found = (const Json **)bsearch(&key, names->keys, names->count, sizeof key,
                                                json_compare);
    return found ? token_id(t, *found + 1) : -1;
}

static void load_vocab(Tokenizer *t, const Json *vocab, Names *names) {
    names->keys = json_sorted(json_expect(vocab, JSON_OBJECT, t->path, "vocab"), &names->count);
    JSON_EACH(name, vocab) {
        Bytes *piece = add_piece(t, token_id(t, name + 1));
        piece->size = spelled_bytes(piece->data, name);
        t->pool += piece->size;
    }
    for (uint32_t b = 0; b < 256; b++) {
        char name[4];
        t->byte_id[b] = find_token(t, names, name, utf8_encode(name, byte_char(b)));
    }
}

// Where the merge of two tokens is in the hash table, or belongs.
static Merge *find_merge(const Tokenizer *t, int32_t left, int32_t right) {
    uint64_t pair = (uint64_t)left << 32 | (uint64_t)right;
    for (size_t i = (size_t)((pair * 0x9E3779B97F4A7C15u) >> 32);; i++) {
        Merge *m = &t->merge[i & (t->slots - 1)];
        if ((m->left == left && m->right == right) || m->rank == NO_MERGE)
            return m;
    }
}

static void load_merges(Tokenizer *t, const Json *merges, const Names *names) {
    json_expect(merges, JSON_ARRAY, t->path, "merges");
    size_t count = 0;
    JSON_EACH(merge, merges)
        count++;
    for (t->slots = 2; t->slots < 2 * count; t->slots *= 2)
        ;
    t->merge = (Merge *)alloc(t->slots, sizeof *t->merge);
    t->merged = (int32_t *)alloc(count + 1, sizeof *t->merged);
    for (size_t i = 0; i < t->slots; i++)
        t->merge[i].rank = NO_MERGE;
    uint32_t rank = 0;
    JSON_EACH(pair, merges) {    // "left right" or ["left", "right"]
        int apart = pair->kind == JSON_ARRAY && pair->span == 3;
        const Json *left = json_expect(apart ? pair + 1 : pair, JSON_STRING, t->path, "merges");
        const Json *right = json_expect(apart ? pair + 2 : pair, JSON_STRING, t->path, "merges");
        size_t n = apart ? left->size : strcspn(left->text, " "), skip = apart ? 0 : n + 1;
        CHECK(skip <= right->size, "%s: merge %u is \"%s\"; expected two tokens", t->path, rank,
              left->text);
        char *both = (char *)memcpy(t->pool, left->text, n);
        size_t size = n + right->size - skip;
        memcpy(both + n, right->text + skip, size - n);
        Merge m = { find_token(t, names, both, n), find_token(t, names, both + n, size - n), rank };
        int32_t id = find_token(t, names, both, size);
        CHECK(m.left >= 0 && m.right >= 0 && id >= 0, "%s: merge %u makes \"%.*s\" of two parts; "
              "not all three are in the vocabulary", t->path, rank, (int)size, both);
        *find_merge(t, m.left, m.right) = m;
        t->merged[rank++] = id;
    }
}

// The first character that is not UTF-8, or that KINDS leaves out where it matters; end if none is.
static const char *find_unknown(const Tokenizer *t, const char *s, const char *end) {
    for (size_t length; s < end; s += length) {
        uint32_t code = 0;
        length = utf8_decode(s, end, &code);
        int known = code < sizeof t->kind && t->kind[code] != 'X';
        if (length == 0 || ((t->use_regex || t->nfc) && !known))
            break;
    }
    return s;
}

// Added tokens are cut out of the text before anything else: those of level 0 out of the text as it
// is, those of level 1 out of what is left in normal form. The library numbers new ones itself.
static void load_added(Tokenizer *t, const Json *list, const Names *names) {
    int32_t next = (int32_t)names->count;
    t->added = (AddedToken *)alloc(list->span, sizeof *t->added);
    JSON_EACH(token, list) {
        const Json *text = json_expect(json_get(token, "content"), JSON_STRING, t->path, "content");
        int32_t id = token_id(t, json_get(token, "id"));
        int32_t old = find_token(t, names, text->text, text->size), expected = old < 0 ? next : old;
        CHECK(text->size && id == expected, "%s: the added token \"%s\" has the id %d; expected %d",
              t->path, text->text, id, expected);
        next = id < next ? next : id + 1;
        Bytes *piece = old < 0 ? add_piece(t, id) : &t->piece[id];
        piece->data = (char *)memcpy(t->pool, text->text, text->size);
        piece->size = text->size;
        t->pool += text->size;
        CHECK(!t->nfc || find_unknown(t, piece->data, t->pool) == t->pool,
              "%s: the normal form of the added token \"%s\" is not known", t->path, text->text);
        size_t i = t->n_added++;
        for (; i > 0 && t->added[i - 1].text.size <= piece->size; i--) {
            Bytes other = t->added[i - 1].text;
            CHECK(other.size < piece->size || memcmp(other.data, piece->data, piece->size),
                  "%s: the added token \"%s\" occurs twice", t->path, text->text);
            t->added[i] = t->added[i - 1];
        }
        t->added[i].text = *piece;
        t->added[i].id = id;
        t->added[i].level = json_bool(token, t->path, "normalized", 0);
        t->starts[t->added[i].level][(unsigned char)*piece->data] = 1;
        int known_end = !strcmp(text->text, "</s>") || !strcmp(text->text, "<|end_of_text|>");
        if (!strcmp(text->text, "<|endoftext|>") || (t->eot < 0 && known_end))
            t->eot = id;
    }
}

static void expand_kinds(char *kind, size_t size) {
    char *letter;
    for (const char *entry = KINDS; *entry; entry = letter) {
        size_t first = strtoul(entry, &letter, 16);
        memset(kind + first, *letter++, size - first);
    }
}

static Tokenizer *tokenizer_parse(const char *path, Bytes file) {
    Tokenizer *t = (Tokenizer *)alloc(1, sizeof *t);
    Json *root = json_parse(path, file.data, file.size);
    Text where = { NULL, 0, 0 };
    refuse_unsupported(path, root, &where);
    free(where.data);

    const Json *pre = json_get(root, "pre_tokenizer"), *added = json_get(root, "added_tokens");
    const Json *model = json_expect(json_get(root, "model"), JSON_OBJECT, path, "model");
    json_expect(pre, JSON_OBJECT, path, "pre_tokenizer");
    Names names;
    t->path = path;
    t->file = file;
    t->eot = -1;
    t->pool = (char *)alloc(file.size, 1);    // all names are a part of the file
    t->piece = (Bytes *)alloc(MAX_VOCAB, sizeof *t->piece);
    t->use_regex = json_bool(pre, path, "use_regex", 1);
    t->nfc = json_get(root, "normalizer") != NULL;
    expand_kinds(t->kind, sizeof t->kind);
    load_vocab(t, json_get(model, "vocab"), &names);
    load_merges(t, json_get(model, "merges"), &names);
    if (added)
        load_added(t, added, &names);
    t->byte_level = !t->nfc && json_get(model, "merges")->span == 1;
    for (int b = 0; b < 256; b++)
        t->byte_level &= t->byte_id[b] == b;

    free(names.keys);
    json_free(root);
    return t;
}

static Tokenizer *tokenizer_load(const char *path) {
    return tokenizer_parse(path, read_file(path));
}

// ---- our own: bytes -----------------------------------------------------------------------------

static void put_byte_tokenizer(Text *json) {
    static const char *const bytes = "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
                                     "\"trim_offsets\": true, \"use_regex\": false}";
    put(json, "{\n  \"version\": \"1.0\", \"truncation\": null, \"padding\": null,\n"
        "  \"added_tokens\": [{\"id\": 256, \"content\": \"<|endoftext|>\", \"special\": true,\n"
        "    \"normalized\": false, \"single_word\": false, \"lstrip\": false, "
        "\"rstrip\": false}],\n"
        "  \"normalizer\": null,\n  \"pre_tokenizer\": %s,\n  \"post_processor\": null,\n"
        "  \"decoder\": %s,\n  \"model\": {\"type\": \"BPE\", \"merges\": [], \"vocab\": {",
        bytes, bytes);
    for (uint32_t b = 0; b < 256; b++) {
        char name[4];
        put(json, b ? ", " : "");
        put_json_string(json, name, utf8_encode(name, byte_char(b)));
        put(json, ": %u", b);
    }
    put(json, "}}\n}\n");
}

// What a text is without tokenizer.json: all its bytes are tokens, none of it means end of text.
static Tokenizer *tokenizer_bytes(void) {
    Text json = { NULL, 0, 0 };
    put_byte_tokenizer(&json);
    Bytes file = { json.data, json.size };
    Tokenizer *t = tokenizer_parse("the byte tokenizer", file);
    memset(t->starts, 0, sizeof t->starts);
    return t;
}

// tokenizer_config.json, for without a class transformers may take another one by model_type.
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

// ---- encoding -----------------------------------------------------------------------------------

typedef struct { int32_t id; uint32_t previous, next, rank; } Symbol;    // rank: of merging next

typedef struct {
    const Tokenizer *t;
    int32_t *ids;                // (count) the result
    size_t count, room;
    Symbol *symbol;              // (symbol_room) the word that is being merged, a linked list
    uint64_t *heap;              // (heap_size) its merges, rank << 32 | position, the least on top
    size_t symbol_room, heap_size;
} Encoder;

static void put_id(Encoder *e, int32_t id) {
    if (e->count == e->room) {
        e->room = 2 * e->room + 1024;
        e->ids = (int32_t *)realloc(e->ids, mul(e->room, sizeof *e->ids));
        CHECK(e->ids, "out of memory for %zu tokens", e->room);
    }
    e->ids[e->count++] = id;
}

static void heap_push(Encoder *e, uint64_t x) {
    size_t i = e->heap_size++;
    for (; i > 0 && e->heap[(i - 1) / 2] > x; i = (i - 1) / 2)
        e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = x;
}

static uint64_t heap_pop(Encoder *e) {
    uint64_t top = e->heap[0], last = e->heap[--e->heap_size];
    size_t i = 0, child = 1;
    for (; child < e->heap_size; child = 2 * i + 1) {
        child += child + 1 < e->heap_size && e->heap[child + 1] < e->heap[child];
        if (last <= e->heap[child])
            break;
        e->heap[i] = e->heap[child];
        i = child;
    }
    e->heap[i] = last;
    return top;
}

static void consider_merge(Encoder *e, uint32_t i, uint32_t n)    // of symbol i with its next
{
    Symbol *left = &e->symbol[i];
    left->rank = NO_MERGE;
    if (left->next < n)
        left->rank = find_merge(e->t, left->id, e->symbol[left->next].id)->rank;
    if (left->rank != NO_MERGE)
        heap_push(e, (uint64_t)left->rank << 32 | i);
}

// Byte-pair encoding: of all merges the one of least rank comes first, of equal ones the leftmost.
static void encode_word(Encoder *e, const char *word, size_t size) {
    const Tokenizer *t = e->t;
    uint32_t n = (uint32_t)size;
    CHECK(size < 1u << 30, "%s: a word of %zu bytes; expected less than 1 GiB", t->path, size);
    if (n > e->symbol_room) {
        free(e->symbol);
        free(e->heap);
        e->symbol_room = 2 * size;
        e->symbol = (Symbol *)alloc(e->symbol_room, sizeof *e->symbol);
        e->heap = (uint64_t *)alloc(3 * e->symbol_room, sizeof *e->heap);    // each merge adds <= 2
    }
    for (uint32_t i = 0; i < n; i++) {
        Symbol symbol = { t->byte_id[(unsigned char)word[i]], i - 1, i + 1, NO_MERGE };
        CHECK(symbol.id >= 0, "%s: no token for the byte 0x%02X", t->path, (unsigned char)word[i]);
        e->symbol[i] = symbol;
    }
    for (uint32_t i = 0; i < n; i++)
        consider_merge(e, i, n);
    while (e->heap_size > 0) {
        uint64_t top = heap_pop(e);
        uint32_t rank = (uint32_t)(top >> 32), i = (uint32_t)top;
        Symbol *left = &e->symbol[i];
        if (left->rank != rank)
            continue;    // it or its next has been merged since
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

static char kind_at(const Tokenizer *t, const char *s, const char *end, size_t *length) {
    uint32_t code = 0;
    *length = utf8_decode(s, end, &code);
    return t->kind[code];
}

// The end of the word that starts at s, by the pattern of GPT-2 (L letters, N numbers):
//     's|'t|'re|'ve|'m|'ll|'d| ?L+| ?N+| ?[^\sLN]+|\s+(?!\S)|\s+
static const char *word_end(const Tokenizer *t, const char *s, const char *end) {
    static const char *const suffixes[] = { "'s", "'t", "'re", "'ve", "'m", "'ll", "'d" };
    for (size_t i = 0; *s == '\'' && i < sizeof suffixes / sizeof *suffixes; i++) {
        size_t n = strlen(suffixes[i]);
        if (n <= (size_t)(end - s) && !memcmp(s, suffixes[i], n))
            return s + n;
    }
    size_t length;
    const char *at = s, *last = s;
    if (*s == ' ' && s + 1 < end && kind_at(t, s + 1, end, &length) != 'S')
        at++;
    char kind = kind_at(t, at, end, &length);
    for (; at < end && kind_at(t, at, end, &length) == kind; at += length)
        last = at;
    int leave_last = kind == 'S' && at < end && last > s;    // the last space, to the next word
    return leave_last ? last : at;
}

static void encode_words(Encoder *e, const char *s, const char *end) {
    const Tokenizer *t = e->t;
    for (const char *next; s < end; s = next) {
        next = t->byte_level ? s + 1 : t->use_regex ? word_end(t, s, end) : end;
        encode_word(e, s, (size_t)(next - s));
    }
}

static const AddedToken *added_at(const Tokenizer *t, const char *s, const char *end, int level) {
    for (size_t i = 0; t->starts[level][(unsigned char)*s] && i < t->n_added; i++) {
        const AddedToken *a = &t->added[i];
        size_t n = a->text.size;
        if (a->level == level && n <= (size_t)(end - s) && !memcmp(s, a->text.data, n))
            return a;    // the longest that is here
    }
    return NULL;
}

static void encode_level(Encoder *e, const char *s, const char *end, int level) {
    if (level == 2) {
        encode_words(e, s, end);
        return;
    }
    for (const char *p = s; p < end;) {
        const AddedToken *a = added_at(e->t, p, end, level);
        if (!a) {
            p++;
            continue;
        }
        encode_level(e, s, p, level + 1);
        put_id(e, a->id);
        s = p += a->text.size;
    }
    encode_level(e, s, end, level + 1);
}

// The ids of a text, (count), NULL for none; free() them. path names the text in errors.
static int32_t *tokenizer_encode(const Tokenizer *t, const char *path, const char *text,
                                 size_t size, size_t *count) {
    Encoder e = { t, NULL, 0, 0, NULL, NULL, 0, 0 };
    const char *end = text + size, *unknown = t->byte_level ? end : find_unknown(t, text, end);
    if (unknown < end) {
        uint32_t code = 0;
        CHECK(utf8_decode(unknown, end, &code), "%s: byte %zu, 0x%02X, is not UTF-8; %s expects it",
              path, (size_t)(unknown - text), (unsigned char)*unknown, t->path);
        die("%s: byte %zu: how to split at U+%04X is not known here; encode the text elsewhere, to "
            ".bin shards", path, (size_t)(unknown - text), (unsigned)code);
    }
    encode_level(&e, text, end, 0);
    free(e.symbol);
    free(e.heap);
    *count = e.count;
    return e.ids;
}

// The bytes of a token; NULL and no size where there is none.
static const char *tokenizer_piece(const Tokenizer *t, int id, size_t *size) {
    int known = id >= 0 && id < t->vocab;
    *size = known ? t->piece[id].size : 0;
    return known ? t->piece[id].data : NULL;
}
