# launch.pl FILE.cu: prints it, the pieces of CUDA that are not C++ rewritten for a host compiler.
#   k<T><<<grid, block, shared, stream>>>(args)  ->  emu::launch("k<T>", k<T>, grid, ...)(args)
#   extern __shared__ T name[];                  ->  T *name = emu::dynamic_shared<T>();
#   __shared__ T name[N];                        ->  static .. emu::Shared<T[N]> name_shared;
#                                                    T (&name)[N] = name_shared.get();
#   #include "other.cu" or ".cuh"                ->  that file, rewritten
# Lines stay lines, so that compilers, sanitizers and gdb name those of the .cu file.
use strict;
use warnings;

my $text = qr{//[^\n]*|/\*.*?\*/|R"\(.*?\)"|"(?:[^"\\\n]|\\.)*"|'(?:\\[^'\n]+|[^'\\\n])'}s;
my $kernel = qr{[A-Za-z_][\w:]*(?:<(?:[^<>;]|<[^<>;]*>)*>)?};
my $align = qr{(?:(?:__align__|alignas)\(\d+\)\s*)?};
my $names = qr{\w+(?:\s*\[[^;]*?\])*};          # x[N][M]

sub rewrite {
    my ($file) = @_;
    open my $in, '<', $file or die "launch.pl: $file: $!\n";
    my $cuda = do { local $/; <$in> };
    my ($line, $from) = (1, 0);
    $cuda =~ s{
          (?<include>^[ \t]*\#[ \t]*include[ \t]*"(?<path>[^"\n]+\.cuh?)")
        | (?<text>$text)
        | \b(?<kernel>$kernel)(?<gap>\s*)<<<(?<shape>.*?)>>>
        | \bextern\s+__shared__\s+$align(?<type>[\w:\s\*]+?)\s*\b(?<name>\w+)\s*\[\s*\]\s*;
        | \b__shared__\s+$align(?<of>[^;=()]*?[\s>\*])(?<names>$names(?:\s*,\s*$names)*)\s*;
    }{
        my %m = %+;
        my $new = exists $m{text} ? $m{text}
            : exists $m{path} ? included($file, $m{path}, substr($cuda, 0, $-[0]) =~ tr/\n//)
            : exists $m{kernel} ? launch(@m{qw(kernel gap shape)})
            : exists $m{name} ? "$m{type} *$m{name} = emu::dynamic_shared<$m{type}>();"
            : shared($m{of}, $m{names});
        $new;
    }gsemx;
    return "#line 1 \"$file\"\n$cuda";
}
sub included {                          # found beside the file that includes it
    my ($file, $path, $lines_before) = @_;
    my $next = $lines_before + 2;
    (my $folder = $file) =~ s{[^/]*$}{};
    return rewrite("$folder$path") . "\n#line $next \"$file\"";
}
sub launch {
    my ($kernel, $gap, $shape) = @_;
    (my $name = $kernel) =~ s/\s+/ /g;
    return "emu::launch(\"$name\", $kernel$gap, $shape)";
}
sub shared {                            # one reference for each name that is declared
    my ($type, $names) = @_;
    $type =~ s/\s+$//;
    return join ' ', map {
        my ($name, $size) = /^\s*(\w+)\s*(.*?)\s*$/s;
        my $reference = $size eq '' ? "$type &$name" : "$type (&$name)$size";
        "static constinit emu::Shared<$type$size> ${name}_shared{}; "
            . "$reference = ${name}_shared.get();";
    } split /,(?![^\[]*\])/, $names;
}
print rewrite($ARGV[0]);
