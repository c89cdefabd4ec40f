# gdb -x dev/emulate/emulate.gdb PROGRAM: the CUDA threads of the block that runs (x86-64 only)
define cuda-threads
  set $b = emu::block
  set $i = 0
  set $line = -2
  while $i < $b->threads_n
    set $t = &$b->threads[$i]
    set $ready = $b->warps[$t->warp].ready >> $t->lane & 1
    set $now = $t->done ? -1 : $ready ? 0 : $t->at.line
    if $now != $line || $t == $b->current || $t == $b->current + 1
      set $line = $now
      printf "thread %d (%d,%d,%d)", $i, $t->idx.x, $t->idx.y, $t->idx.z
      if $t == $b->current
        printf " runs\n"
      else
        if $t->done
          printf " ff. have ended\n"
        else
          if $ready
            printf " ff. can go on\n"
          else
            printf " ff. wait for %s at %s:%d\n", $t->what, $t->at.file, $t->at.line
          end
        end
      end
    end
    set $i = $i + 1
  end
end
document cuda-threads
Says where the threads of the block are: one line for each run of threads at one place.
end

define cuda-thread
  set $t = &emu::block->threads[$arg0]
  set $sp0 = $rsp
  set $pc0 = $rip
  set $r12_0 = $r12
  set $rbx0 = $rbx
  set $rbp0 = $rbp
  set $saved = (long *)$t->sp
  set $r12 = $saved[3]
  set $rbx = $saved[4]
  set $rbp = $saved[5]
  set $rip = $saved[6]
  set $rsp = (long)($saved + 7)
  backtrace
end
document cuda-thread
cuda-thread N: shows the stack of waiting thread N; frame, up and print work there.
Say cuda-back before anything else, or before another cuda-thread.
end

define cuda-back
  select-frame 0
  set $rsp = $sp0
  set $rip = $pc0
  set $r12 = $r12_0
  set $rbx = $rbx0
  set $rbp = $rbp0
end
document cuda-back
Returns from cuda-thread to the thread that runs.
end
