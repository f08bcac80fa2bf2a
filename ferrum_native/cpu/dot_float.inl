inline void deq_f32(const std::byte* p, int k, float* o) { std::memcpy(o, p, size_t(k)*4); }
inline void deq_f16(const std::byte* p, int k, float* o) { for (int i=0;i<k;i++) o[i]=f16_to_float(load_u16(p+2*i)); }
inline void deq_bf16(const std::byte* p, int k, float* o) { for (int i=0;i<k;i++) { uint32_t b=uint32_t(load_u16(p+2*i))<<16; std::memcpy(o+i,&b,4);} }
inline float fdot(const float* w, const float* y, int k) { F8 s[4]={zero(),zero(),zero(),zero()}; int i=0; for(;i+32<=k;i+=32) for(int j=0;j<4;j++) s[j]=fma(load(w+i+8*j),load(y+i+8*j),s[j]);
 if(i<k){ float a[32]={},b[32]={}; std::memcpy(a,w+i,size_t(k-i)*4); std::memcpy(b,y+i,size_t(k-i)*4); for(int j=0;j<4;j++) s[j]=fma(load(a+8*j),load(b+8*j),s[j]); } return reduce_add((s[0]+s[1])+(s[2]+s[3])); }
template <void (*D)(const std::byte*, int, float*)> void dotf(const DotArgs& a) { float* w = reinterpret_cast<float*>(a.scratch); for (int r=0;r<a.rows;r++){ D(a.weights+size_t(r)*a.row_bytes,a.k,w); for(int c=0;c<a.column_count;c++) a.out[c][r]=fdot(w,a.columns[c].values,a.k);} }
template <int B> inline void quant(const float* x, int k, int8_t* q, float* s, int16_t* sums) { for (int b=0;b<k/B;b++){ float m=0; for(int i=0;i<B;i++) m=std::fmax(m,std::fabs(x[b*B+i])); s[b]=m/127; float inv=m>0?127/m:0; for(int i=0;i<B;i++) q[b*B+i]=int8_t(std::nearbyint(x[b*B+i]*inv)); if(sums) for(int j=0;j<B/16;j++){int t=0;for(int i=0;i<16;i++)t+=q[b*B+16*j+i];sums[b*B/16+j]=int16_t(t);} } }
void q32(const float* x, int k, int8_t* q, float* s) { quant<32>(x,k,q,s,nullptr); }
void q256(const float* x, int k, int8_t* q, float* s, int16_t* m) { quant<256>(x,k,q,s,m); }
