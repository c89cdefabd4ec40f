// ==== loss.png ===================================================================================
// A picture in lines of a round pen, letters too, each over what is there already: the pen covers a
// pixel as far as it lies inside the line, so that edges are smooth.

static const int PLOT_WIDTH = 960, PLOT_HEIGHT = 600, PLOT_ROW = 1 + 3 * 960;  // PNG: filter, RGB
static const int PLOT_LEFT = 88, PLOT_RIGHT = 932, PLOT_TOP = 88, PLOT_BOTTOM = 540;   // the frame
static const int PLOT_GRID = 0xe4e4e4, PLOT_GRAY = 0x606060, PLOT_BLACK = 0x202020;

typedef struct { double x, y; } Point;
typedef struct { const char *label; uint32_t color; const Point *points; size_t count; } Series;

typedef struct {
    Point lo, hi, scale;      // values at the frame's lower left and upper right; pixels a unit
    int top, bottom;          // pixel rows that lines may touch
    unsigned char *rows;      // (PLOT_HEIGHT,PLOT_ROW)
} Plot;

static void plot_line(Plot *p, double x0, double y0, double x1, double y1, double width,
                      int color) {
    double dx = x1 - x0, dy = y1 - y0, length2 = dx * dx + dy * dy, reach = width / 2 + 0.5;
    int left = (int)fmax(0, fmin(x0, x1) - reach);
    int right = (int)fmin(PLOT_WIDTH, fmax(x0, x1) + reach + 1);
    int top = (int)fmax(p->top, fmin(y0, y1) - reach);
    int bottom = (int)fmin(p->bottom, fmax(y0, y1) + reach + 1);
    for (int y = top; y < bottom; y++) {
        for (int x = left; x < right; x++) {
            double px = x + 0.5 - x0, py = y + 0.5 - y0;
            double along = length2 > 0 ? fmax(0, fmin(1, (px * dx + py * dy) / length2)) : 0;
            double cover = fmin(1, reach - hypot(px - along * dx, py - along * dy));
            unsigned char *pixel = p->rows + y * PLOT_ROW + 1 + 3 * x;
            for (int c = 0; c < 3 && cover > 0; c++) {
                double ink = color >> (16 - 8 * c) & 255;
                pixel[c] = (unsigned char)(pixel[c] + cover * (ink - pixel[c]) + 0.5);
            }
        }
    }
}

// From ' ' to 'z'. A column is a byte, the leftmost one the lowest; bit 0 is its top dot, bit 6
// stands on the line, bit 7 hangs below it.
static const uint64_t plot_font[] = {
    0x0000000000, 0x00005f0000, 0x0003000300, 0x147f147f14, 0x122a7f2a24, 0x6364081363,
    0x5022554936, 0x0000030000, 0x0000413e00, 0x00003e4100, 0x14081c0814, 0x08083e0808,
    0x0000408000, 0x0008080800, 0x0000400000, 0x00030c30c0, 0x3e4141413e, 0x00407f4200,
    0x4649516142, 0x3649494122, 0x107f121418, 0x3945454527, 0x304949493e, 0x030d710101,
    0x3649494936, 0x3e49494906, 0x0000240000, 0x0000648000, 0x0022140800, 0x0014141400,
    0x0008142200, 0x0609510102, 0x5e555d413e, 0x7816111678, 0x364949497f, 0x224141413e,
    0x3e4141417f, 0x414949497f, 0x010909097f, 0x3a4949413e, 0x7f0808087f, 0x00417f4100,
    0x003f404020, 0x412214087f, 0x004040407f, 0x7f020c027f, 0x7f3008067f, 0x3e4141413e,
    0x060909097f, 0x5e2141413e, 0x462919097f, 0x3249494926, 0x01017f0101, 0x3f4040403f,
    0x0738403807, 0x7f2018207f, 0x6314081463, 0x030c700c03, 0x4345495161, 0x0000417f00,
    0x6010080403, 0x00007f4100, 0x0402010204, 0x4040404040, 0x0000020100, 0x7854545420,
    0x384444447f, 0x0044444438, 0x7f44444438, 0x1854545438, 0x0005057e04, 0x7ca4a4a418,
    0x780404047f, 0x00407d4400, 0x007d848040, 0x004428107f, 0x00407f4100, 0x780478047c,
    0x780404047c, 0x3844444438, 0x18242424fc, 0xfc24242418, 0x000404087c, 0x2454545448,
    0x0044443f04, 0x7c4040403c, 0x0c3040300c, 0x3c4038403c, 0x4428102844, 0x0c3060908c,
    0x444c546444,
};

// Letters of `size` pixels a dot; x is the start (align 0), middle (0.5) or end (1) of the text,
// y the line it stands on. The pen joins neighbouring dots.
static void plot_text(Plot *p, double x, double y, double align, double size, int color,
                      const char *text) {
    static const int joined[5][2] = {{0, 0}, {0, 1}, {1, -1}, {1, 0}, {1, 1}};
    for (x -= align * size * (6.0 * (double)strlen(text) - 2); *text; text++, x += 6 * size) {
        uint64_t glyph = plot_font[*text >= ' ' && *text <= 'z' ? *text - ' ' : '?' - ' '];
        for (int k = 0; k < 5 * 8 * 5; k++) {
            int c = k / 40, r = k / 5 % 8, cc = c + joined[k % 5][0], rr = r + joined[k % 5][1];
            if (rr < 0 || rr > 7 || !(glyph >> (8 * c + r) & glyph >> (8 * cc + rr) & 1)) continue;
            plot_line(p, x + c * size, y + (r - 6) * size, x + cc * size, y + (rr - 6) * size,
                      0.72 * size, color);
        }
    }
}

static int plot_drawable(Point v) { return fabs(v.x) < 1e30 && fabs(v.y) < 1e30; }   // NaN is not

static int plot_order(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void plot_widen(double *lo, double *hi, double share) {
    if (*lo > *hi) *lo = *hi = 0;                            // there were no values
    double span = *hi - *lo, size = fmax(fabs(*lo), fabs(*hi));
    double room = span > 1e-4 * size ? share * span : size > 0 ? 0.1 * size : 1;
    *lo -= room;
    *hi += room;
}

// The x axis shows everything; the y axis 0.5% to 97% of the values of each series (of up to 4096
// of them, without the untrained model's): early losses and spikes leave the frame.
static void plot_limits(Plot *p, const Series *series, size_t count) {
    enum { SAMPLE = 4096 };
    double *y = (double *)alloc(SAMPLE, sizeof *y);
    p->lo.x = p->lo.y = HUGE_VAL, p->hi.x = p->hi.y = -HUGE_VAL;
    for (size_t s = 0; s < count; s++) {
        size_t n = 0, stride = series[s].count / SAMPLE + 1, first = series[s].count > 8;
        for (size_t i = 0; i < series[s].count; i++) {
            Point v = series[s].points[i];
            if (!plot_drawable(v)) continue;
            p->lo.x = fmin(p->lo.x, v.x), p->hi.x = fmax(p->hi.x, v.x);
            if (i >= first && i % stride == 0) y[n++] = v.y;
        }
        if (n == 0) continue;
        qsort(y, n, sizeof *y, plot_order);
        p->lo.y = fmin(p->lo.y, y[(size_t)(0.005 * (double)(n - 1) + 0.5)]);
        p->hi.y = fmax(p->hi.y, y[(size_t)(0.97 * (double)(n - 1) + 0.5)]);
    }
    plot_widen(&p->lo.x, &p->hi.x, 0.015);
    plot_widen(&p->lo.y, &p->hi.y, 0.06);
    p->scale.x = (PLOT_RIGHT - PLOT_LEFT) / (p->hi.x - p->lo.x);
    p->scale.y = (PLOT_TOP - PLOT_BOTTOM) / (p->hi.y - p->lo.y);
    free(y);
}

static double plot_x(const Plot *p, double x) { return PLOT_LEFT + (x - p->lo.x) * p->scale.x; }
static double plot_y(const Plot *p, double y) { return PLOT_BOTTOM + (y - p->lo.y) * p->scale.y; }

static double plot_tick(double span, int most)               // 1, 2 or 5 times a power of ten
{
    double power = pow(10, floor(log10(span / most))), times = span / most / power;
    return power * (times <= 1 ? 1 : times <= 2 ? 2 : times <= 5 ? 5 : 10);
}

static void plot_number(char text[32], double v, double tick)        // 0.85, 500, 1.5K
{
    double unit = fabs(v) >= 1e9 ? 1e9 : fabs(v) >= 1e6 ? 1e6 : fabs(v) >= 1e3 ? 1e3 : 1;
    const char *name = unit == 1e9 ? "B" : unit == 1e6 ? "M" : unit == 1e3 ? "K" : "";
    int decimals = (int)fmax(0, ceil(-log10(tick) - 1e-6));
    if (unit > 1 || decimals > 5) snprintf(text, 32, "%.5g%s", v / unit, name);
    else snprintf(text, 32, "%.*f", decimals, v);
}

static void plot_axes(Plot *p) {
    double x_tick = fmax(1, plot_tick(p->hi.x - p->lo.x, 9));        // steps are whole
    double y_tick = plot_tick(p->hi.y - p->lo.y, 8);
    char text[32];
    for (double k = ceil(p->lo.x / x_tick); k * x_tick <= p->hi.x; k++) {
        double x = floor(plot_x(p, k * x_tick)) + 0.5;
        plot_line(p, x, PLOT_TOP, x, PLOT_BOTTOM, 1, PLOT_GRID);
        plot_number(text, k * x_tick + 0.0, x_tick);
        plot_text(p, x, PLOT_BOTTOM + 24, 0.5, 1.8, PLOT_GRAY, text);
    }
    for (double k = ceil(p->lo.y / y_tick); k * y_tick <= p->hi.y; k++) {
        double y = floor(plot_y(p, k * y_tick)) + 0.5;
        plot_line(p, PLOT_LEFT, y, PLOT_RIGHT, y, 1, PLOT_GRID);
        plot_number(text, k * y_tick + 0.0, y_tick);
        plot_text(p, PLOT_LEFT - 12, y + 5, 1, 1.8, PLOT_GRAY, text);
    }
    plot_line(p, PLOT_LEFT, PLOT_BOTTOM + 0.5, PLOT_RIGHT, PLOT_BOTTOM + 0.5, 1, PLOT_GRAY);
}

// Joins the means of every `window` points; returns the last one. What is far outside the frame
// counts as just outside. Where many points share a column of pixels, lo to hi is drawn there, and
// only what reaches beyond is added.
static double plot_curve(Plot *p, const Series *s, size_t window, double width, double dot,
                         int color) {
    double room = (p->hi.y - p->lo.y) / 4, lo = 0, hi = 0, mean = NAN;
    Point sum = {0, 0}, last = {-1, 0};
    size_t n = 0;
    p->top = PLOT_TOP, p->bottom = PLOT_BOTTOM;
    for (size_t i = 0; i < s->count; i++) {
        Point v = s->points[i];
        if (plot_drawable(v)) {
            sum.x += v.x, sum.y += fmax(p->lo.y - room, fmin(p->hi.y + room, v.y)), n++;
        }
        if (n == 0 || (s->count - 1 - i) % window != 0) continue;
        mean = sum.y / (double)n;
        Point at = {plot_x(p, sum.x / (double)n), plot_y(p, mean)};
        int turn = floor(at.x) != floor(last.x);            // to another column of pixels
        if (last.x < 0) last = at;
        if (turn) lo = hi = last.y;
        double from = fmax(lo, fmin(hi, at.y));
        if (turn || from != at.y) plot_line(p, last.x, from, at.x, at.y, width, color);
        if (dot > 0) plot_line(p, at.x, at.y, at.x, at.y, dot, color);
        lo = fmin(lo, at.y), hi = fmax(hi, at.y), last = at;
        sum.x = sum.y = 0, n = 0;
    }
    p->top = 0, p->bottom = PLOT_HEIGHT;
    return mean;
}

// A curve, and its legend from x on: up to 64 points have dots, more are drawn lightly under up to
// 64 means. Returns where the next legend goes.
static double plot_series(Plot *p, const Series *s, double x) {
    size_t window = (s->count + 63) / 64;
    int color = (int)s->color, light = 0xc0c0c0 + (color >> 2 & 0x3f3f3f);
    if (window > 1) plot_curve(p, s, 1, 1, 0, light);
    double last = plot_curve(p, s, window, 2.2, window > 1 ? 0 : 7, color);
    if (isnan(last)) return x;
    char value[32], text[128], means[32] = "";
    plot_number(value, last, plot_tick(p->hi.y - p->lo.y, 80));
    if (window > 1) snprintf(means, sizeof means, " (mean of %zu)", window);
    snprintf(text, sizeof text, "%s %s%s", s->label, value, means);
    plot_line(p, x, PLOT_TOP - 26, x + 24, PLOT_TOP - 26, 3, color);
    plot_text(p, x + 36, PLOT_TOP - 20, 0, 1.8, PLOT_BLACK, text);
    return x + 36 + 6 * 1.8 * ((double)strlen(text) + 3);
}

static unsigned char *plot_be32(unsigned char *to, size_t value) {
    for (int i = 0; i < 4; i++) to[i] = (unsigned char)(value >> (24 - 8 * i));
    return to + 4;
}

// Makes a PNG chunk, size, type, data, crc32, of data that lies at chunk + 8; returns its end.
static unsigned char *plot_chunk(unsigned char *chunk, const char *type, size_t size) {
    memcpy(plot_be32(chunk, size), type, 4);
    return plot_be32(chunk + 8 + size, crc32(0, chunk + 4, (uInt)size + 4));
}

static void plot_png(const char *path, const unsigned char *rows) {
    uLong size = (uLong)PLOT_HEIGHT * (uLong)PLOT_ROW, packed = compressBound(size);
    unsigned char *file = (unsigned char *)alloc(packed + 64, 1), *end = file + 8;
    memcpy(file, "\x89PNG\r\n\x1a\n", 8);
    plot_be32(plot_be32(end + 8, (size_t)PLOT_WIDTH), (size_t)PLOT_HEIGHT);
    memcpy(end + 16, "\x08\x02\0\0\0", 5);                   // 8 bits of R, G and B
    end = plot_chunk(end, "IHDR", 13);
    CHECK(compress2(end + 8, &packed, rows, size, 6) == Z_OK, "%s: zlib failed", path);
    end = plot_chunk(end, "IDAT", packed);
    end = plot_chunk(end, "IEND", 0);
    Text aside = {NULL, 0, 0};
    put(&aside, "%s.tmp", path);
    write_file(aside.data, file, (size_t)(end - file));
    CHECK(rename(aside.data, path) == 0, "%s: cannot be replaced: %s", path, strerror(errno));
    free(aside.data);
    free(file);
}

static void plot_write(const char *path, const char *title, const char *x_label,
                       const char *y_label, const Series *series, size_t count) {
    Plot p = {{0, 0}, {0, 0}, {0, 0}, 0, PLOT_HEIGHT, NULL};
    size_t row = (size_t)PLOT_ROW;
    p.rows = (unsigned char *)alloc((size_t)PLOT_HEIGHT, row);
    for (int y = 0; y < PLOT_HEIGHT; y++) memset(p.rows + y * PLOT_ROW + 1, 255, row - 1);
    plot_limits(&p, series, count);
    plot_axes(&p);
    double title_size = fmin(2.4, 140 / (1 + (double)strlen(title)));
    plot_text(&p, PLOT_LEFT, 36, 0, title_size, PLOT_BLACK, title);
    plot_text(&p, (PLOT_LEFT + PLOT_RIGHT) / 2, PLOT_HEIGHT - 14, 0.5, 1.8, PLOT_GRAY, x_label);
    plot_text(&p, PLOT_LEFT, PLOT_TOP - 20, 0, 1.8, PLOT_GRAY, y_label);
    double x = PLOT_LEFT + 6 * 1.8 * ((double)strlen(y_label) + 3);
    for (size_t s = 0; s < count; s++) x = plot_series(&p, &series[s], x);
    plot_png(path, p.rows);
    free(p.rows);
}
